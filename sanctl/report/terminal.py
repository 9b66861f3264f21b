"""A run on a terminal: bars, figures and a table of the last epochs, redrawn in place."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sanctl.report.console import clock, out
from sanctl.report.records import EpochRecord, RunInfo, RunSummary, StepRecord
from sanctl.report.reporter import Reporter
from sanctl.report.runview import RunView

SECONDS_BETWEEN_DRAWINGS = 0.25


class TerminalReporter(Reporter):
    """Draws a run, at most four times a second; what it drew last stays when the run ends.

    Drawing happens in the calls that bring news, never in a thread: a step between two drawings
    costs a comparison of times, and worker processes may be forked at any moment.

    Args:
        console: A terminal.
        monotonic: Returns the time in s.
    """

    def __init__(
        self, console: Console = out, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._monotonic = monotonic
        self._view = RunView()
        self._live = Live(self._view, console=console, auto_refresh=False)
        self._next_drawing = 0.0
        self._starts_whole = True

    def run_started(self, info: RunInfo) -> None:
        """Print what is trained, on what, and begin to draw."""
        images = f"{info.train_images:,} training images"
        if info.val_images:
            images += f", {info.val_images:,} validation images"
        for line in (
            f"{info.network} ({info.parameters:,} parameters) on {info.dataset}: "
            f"{info.classes:,} classes, {images}",
            f"{info.device}, {info.precision}, batch size {info.batch_size}, "
            f"epochs {info.first_epoch} to {info.epochs}",
        ):
            self._console.print(line, soft_wrap=False)
        self._console.print(f"writes to {info.run_folder}\n")
        self._view.epochs = info.epochs
        self._view.epoch = info.first_epoch
        self._view.steps = info.steps_per_epoch
        self._live.start()
        self._draw()

    def note(self, text: str) -> None:
        """Print a sentence above what is drawn."""
        self._console.print(Text(text), soft_wrap=False)

    def epoch_started(self, epoch: int, steps: int, start_step: int) -> None:
        """Show the epoch's bar."""
        self._view.epoch = epoch
        self._starts_whole = start_step == 0
        self._view.epoch_began = self._monotonic()
        self._begin_phase("train", steps, start_step)

    def step(self, record: StepRecord) -> None:
        """Show the step, if the time for a drawing has come."""
        view = self._view
        view.record = record
        view.step = record.step
        if record.loss is not None:
            view.loss = record.loss
        if self._monotonic() >= self._next_drawing:
            self._draw()

    def evaluation_started(self, steps: int) -> None:
        """Show the evaluation's bar."""
        self._begin_phase("val", steps, 0)

    def evaluation_step(self, record: StepRecord) -> None:
        """Show the step, if the time for a drawing has come."""
        self.step(record)

    def epoch_finished(self, record: EpochRecord) -> None:
        """Add the epoch to the table."""
        view = self._view
        view.finished.append(record)
        if record.best:
            view.best = record
        if self._starts_whole:
            view.epoch_seconds.append(self._monotonic() - view.epoch_began)
        self._draw()

    def run_finished(self, summary: RunSummary) -> None:
        """Take the bars away and print the best epoch and where the run lies."""
        self._view.over = True
        self.close()
        line = f"trained in {clock(summary.seconds)}"
        if summary.best_epoch is not None:
            line += f"; best epoch {summary.best_epoch}"
        if summary.best_top1 is not None:
            line += f", top-1 {summary.best_top1:.2f} %"
        self._console.print(f"{line}; see {summary.run_folder}")

    def close(self) -> None:
        """Draw once more and leave the terminal as it was found."""
        if self._live.is_started:
            self._draw()
            self._live.stop()

    def _begin_phase(self, phase: str, steps: int, start_step: int) -> None:
        view = self._view
        view.phase, view.steps = phase, steps
        view.step = view.first_step = start_step
        view.loss = None
        view.phase_began = self._monotonic()
        self._draw()

    def _draw(self) -> None:
        self._view.now = self._monotonic()
        self._next_drawing = self._view.now + SECONDS_BETWEEN_DRAWINGS
        self._live.refresh()
