"""The interface between a run and the ways of showing it."""

from collections.abc import Sequence
from contextlib import ExitStack

from sanctl.report.records import EpochRecord, RankRecord, RunInfo, RunSummary, StepRecord


class Reporter:
    """Hears what a run does; each method does nothing until a subclass says otherwise.

    The order of calls: `run_started`; for every epoch `epoch_started`, `step` per training step,
    then (where the run validates) `evaluation_started`, `evaluation_step` per step, and
    `epoch_finished`; at the end `run_finished`. `note` may come at any time after construction,
    and `close` comes last, also after a failure or Ctrl-C.
    """

    def run_started(self, info: RunInfo) -> None:
        """Hear that a run begins, or goes on at `info.first_epoch`."""

    def note(self, text: str) -> None:
        """Hear a sentence that the user should read."""

    def epoch_started(self, epoch: int, steps: int, start_step: int) -> None:
        """Hear that an epoch of `steps` steps begins, of which `start_step` were done before."""

    def step(self, record: StepRecord) -> None:
        """Hear of one training step."""

    def ranks(self, records: Sequence[RankRecord]) -> None:
        """Hear, every second or so, what each process of the run did lately, in rank order."""

    def evaluation_started(self, steps: int) -> None:
        """Hear that an evaluation of `steps` steps begins."""

    def evaluation_step(self, record: StepRecord) -> None:
        """Hear of one evaluation step."""

    def epoch_finished(self, record: EpochRecord) -> None:
        """Hear the values of a finished epoch."""

    def run_finished(self, summary: RunSummary) -> None:
        """Hear that the run reached its end."""

    def close(self) -> None:
        """Write what is unwritten and let go of files and the terminal; may be called twice."""


class CompositeReporter(Reporter):
    """Passes everything on to several reporters, in their order."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = tuple(reporters)

    def run_started(self, info: RunInfo) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.run_started(info)

    def note(self, text: str) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.note(text)

    def epoch_started(self, epoch: int, steps: int, start_step: int) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.epoch_started(epoch, steps, start_step)

    def step(self, record: StepRecord) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.step(record)

    def ranks(self, records: Sequence[RankRecord]) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.ranks(records)

    def evaluation_started(self, steps: int) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.evaluation_started(steps)

    def evaluation_step(self, record: StepRecord) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.evaluation_step(record)

    def epoch_finished(self, record: EpochRecord) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.epoch_finished(record)

    def run_finished(self, summary: RunSummary) -> None:
        """Pass on."""
        for reporter in self._reporters:
            reporter.run_finished(summary)

    def close(self) -> None:
        """Pass on, to every reporter even where one fails."""
        with ExitStack() as stack:
            for reporter in reversed(self._reporters):
                stack.callback(reporter.close)
