"""A run as lines of `key=value`, for pipes and log files.

Every line begins with what it tells of (`run`, `train`, `val`, `epoch`, `note`, `done`), so that
`grep ^epoch` gives one line per epoch. The order of the keys is fixed, values that hold blanks
stand in double quotes, and nothing but printable characters and the line's end is written. While
ranks lag behind the others, the lines of steps end in `stragglers=RANK:HOW,...`.
"""

import json
from collections.abc import Callable, Mapping, Sequence

from sanctl.report.console import out, printable
from sanctl.report.records import EpochRecord, RankRecord, RunInfo, RunSummary, StepRecord
from sanctl.report.reporter import Reporter
from sanctl.report.stragglers import find_stragglers

MISSING = "-"


def key_values(word: str, values: Mapping[str, object]) -> str:
    """Return one line: a word, then `key=value` for each value, in their order."""
    return " ".join([word, *(f"{key}={_value(value)}" for key, value in values.items())])


def _value(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = printable(str(value))
    needs_quotes = not text or any(char in text for char in ' "=')
    return json.dumps(text, ensure_ascii=False) if needs_quotes else text


class PlainReporter(Reporter):
    """Writes one line every `print_freq` steps, at an epoch's last step, and per epoch.

    Args:
        print_freq: Steps between two lines.
        write: Takes one line without its end; prints to stdout and flushes, unless given.
    """

    def __init__(self, print_freq: int, write: Callable[[str], None] = out.print) -> None:
        self._print_freq = print_freq
        self._write = write
        self._stragglers = ""

    def run_started(self, info: RunInfo) -> None:
        """Write what is trained, on what."""
        fields = {name: getattr(info, name) for name in RunInfo.__slots__}
        self._write(key_values("run", fields))

    def note(self, text: str) -> None:
        """Write the note as it is, on one line."""
        self._write(f"note {printable(text)}")

    def step(self, record: StepRecord) -> None:
        """Write the step, if it is its turn."""
        self._step("train", record)

    def ranks(self, records: Sequence[RankRecord]) -> None:
        """Note which ranks lag behind, for the next line of a step."""
        found = find_stragglers(records)
        self._stragglers = ",".join(f"{rank}:{how}" for rank, how in sorted(found.items()))

    def evaluation_step(self, record: StepRecord) -> None:
        """Write the step, if it is its turn."""
        self._step("val", record)

    def _step(self, word: str, record: StepRecord) -> None:
        if record.step % self._print_freq and record.step != record.steps:
            return
        values: dict[str, object] = {
            "epoch": record.epoch,
            "epochs": record.epochs,
            "step": record.step,
            "steps": record.steps,
            "loss": record.loss,
        }
        if record.lr is not None:
            values["lr"] = record.lr
        values |= {"images_per_s": record.images_per_s, "data_wait": record.data_wait}
        if self._stragglers:
            values["stragglers"] = self._stragglers
        self._write(key_values(word, values))

    def epoch_finished(self, record: EpochRecord) -> None:
        """Write the epoch's values."""
        first: dict[str, object] = {
            "epoch": record.epoch,
            "epochs": record.epochs,
            "best": record.best,
        }
        self._write(key_values("epoch", first | {**record.values, **record.timing} | first))

    def run_finished(self, summary: RunSummary) -> None:
        """Write the best epoch and where the run lies."""
        fields = {name: getattr(summary, name) for name in RunSummary.__slots__}
        self._write(key_values("done", fields))
