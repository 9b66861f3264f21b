"""A run on a terminal: bars, figures, epochs and processes, redrawn in place."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.text import Text

from sanctl.report.console import clock, out
from sanctl.report.records import EpochRecord, RankRecord, RunInfo, RunSummary, StepRecord
from sanctl.report.reporter import Reporter
from sanctl.report.runview import RunView
from sanctl.report.streams import log_above_drawings

SECONDS_BETWEEN_DRAWINGS = 0.25
_KEPT_NOTES = 8

# Held while something is written, and while the process forks: the copy of a process of which
# another thread is writing would wait for ever for that thread's locks.
_WRITING = threading.RLock()
os.register_at_fork(
    before=_WRITING.acquire, after_in_parent=_WRITING.release, after_in_child=_WRITING.release
)


class TerminalReporter(Reporter):
    """Draws a run four times a second; what it drew last stays when the run ends.

    A thread of its own draws, so that a step costs no more than noting its record, and a terminal
    that changes its size is redrawn however long a step takes. Where the terminal goes away,
    training goes on.

    Args:
        console: A terminal.
        monotonic: Returns the time in s.
        seconds_between_drawings: How long the thread waits from one drawing to the next.
    """

    def __init__(
        self,
        console: Console = out,
        monotonic: Callable[[], float] = time.monotonic,
        seconds_between_drawings: float = SECONDS_BETWEEN_DRAWINGS,
    ) -> None:
        self._console = console
        self._monotonic = monotonic
        self._seconds_between_drawings = seconds_between_drawings
        self._view = RunView()
        self._live = Live(self._view, console=console, auto_refresh=False, vertical_overflow="crop")
        self._thread = threading.Thread(target=self._keep_drawing, name="screen", daemon=True)
        self._over = threading.Event()
        self._gone = False
        self._size = console.size
        self._notes: deque[str] = deque(maxlen=_KEPT_NOTES)
        self._starts_whole = True

    def run_started(self, info: RunInfo) -> None:
        """Print what is trained, on what, and begin to draw."""
        images = f"{info.train_images:,} training images"
        if info.val_images:
            images += f", {info.val_images:,} validation images"
        view = self._view
        view.header = (
            f"{info.network} ({info.parameters:,} parameters) on {info.dataset}: "
            f"{info.classes:,} classes, {images}",
            f"{info.device}, {info.precision}, batch size {info.batch_size}, "
            f"epochs {info.first_epoch} to {info.epochs}",
            f"writes to {info.run_folder}",
            "",
        )
        for line in view.header:
            self._print(line)
        view.epochs = info.epochs
        view.epoch = info.first_epoch
        view.steps = info.steps_per_epoch
        log_above_drawings()
        self._write(self._live.start)
        self.draw()
        self._thread.start()

    def note(self, text: str) -> None:
        """Print a sentence above what is drawn."""
        self._notes.append(text)
        self._print(text)

    def epoch_started(self, epoch: int, steps: int, start_step: int) -> None:
        """Show the epoch's bar."""
        with _WRITING:
            self._view.epoch = epoch
            self._starts_whole = start_step == 0
            self._view.epoch_began = self._monotonic()
            self._begin_phase("train", steps, start_step)

    def step(self, record: StepRecord) -> None:
        """Note the step for the next drawing."""
        view = self._view
        view.record = record
        view.step = record.step
        view.stepped = self._monotonic()
        if record.loss is not None:
            view.loss = record.loss

    def ranks(self, records: Sequence[RankRecord]) -> None:
        """Note what the processes did for the next drawing."""
        self._view.ranks = tuple(records)

    def evaluation_started(self, steps: int) -> None:
        """Show the evaluation's bar."""
        with _WRITING:
            self._begin_phase("val", steps, 0)

    def evaluation_step(self, record: StepRecord) -> None:
        """Note the step for the next drawing."""
        self.step(record)

    def epoch_finished(self, record: EpochRecord) -> None:
        """Add the epoch to the table."""
        with _WRITING:
            view = self._view
            view.finished.append(record)
            if record.best:
                view.best = record
            if self._starts_whole:
                view.epoch_seconds.append(self._monotonic() - view.epoch_began)

    def run_finished(self, summary: RunSummary) -> None:
        """Take the bars away and print the best epoch and where the run lies."""
        self._view.over = True
        self.close()
        self._print(describe_end(summary))

    def close(self) -> None:
        """Draw once more and leave the terminal as it was found."""
        if self._live.is_started:
            self._over.set()
            self._thread.join()
            self.draw()
            with suppress(OSError):  # where the terminal is gone: to give stdout back all the same
                self._live.stop()

    def draw(self) -> None:
        """Draw the run as it stands."""
        self._write(self._draw)

    def _begin_phase(self, phase: str, steps: int, start_step: int) -> None:
        view = self._view
        view.phase, view.steps = phase, steps
        view.step = view.first_step = start_step
        view.loss = None
        view.phase_began = self._monotonic()

    def _keep_drawing(self) -> None:
        while not self._over.wait(self._seconds_between_drawings):
            self.draw()

    def _draw(self) -> None:
        self._view.now = self._monotonic()
        with self._console:  # one write for all
            self._start_afresh_if_resized()
            self._live.refresh()

    def _start_afresh_if_resized(self) -> None:
        """Clear a terminal that has another size, and print again what stood above.

        Terminals fold, cut or shift what they show, each in its own way, and Live goes up as many
        lines as it drew.
        """
        size = self._console.size
        if self._live.is_started and size != self._size:
            self._console.control(Control.home(), Control.clear())
            above = Group(*map(Text, (*self._view.header, *self._notes)))
            self._console.print(above, soft_wrap=False)
        self._size = size

    def _print(self, line: str) -> None:
        def act() -> None:
            with self._console:
                self._start_afresh_if_resized()
                self._console.print(Text(line), soft_wrap=False)

        self._write(act)

    def _write(self, act: Callable[[], None]) -> None:
        """Do something that writes, alone; nothing any more where the terminal is gone."""
        with _WRITING:
            if not self._gone:
                try:
                    act()
                except OSError:
                    self._gone = True


def describe_end(summary: RunSummary) -> str:
    """Return a sentence on how a run went and where it lies."""
    line = f"trained in {clock(summary.seconds)}"
    if summary.best_epoch is not None:
        line += f"; best epoch {summary.best_epoch}"
    if summary.best_top1 is not None:
        line += f", top-1 {summary.best_top1:.2f} %"
    return f"{line}; see {summary.run_folder}"
