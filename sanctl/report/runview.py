"""What the terminal shows of a run: a table of epochs, two bars and the latest figures."""

from collections import deque
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sanctl.report.console import clock
from sanctl.report.records import EpochRecord, StepRecord

SHOWN_EPOCHS = 8
_LINES_BESIDE_TABLE = 8
_WIDE = 80
_UNKNOWN = "-"


@dataclass
class RunView:
    """The state of a run, drawn on demand to the width and height that there is.

    Attributes:
        epochs: Last epoch of the run.
        epoch: The current epoch, counted from 1.
        phase: What the steps do: `train` or `val`.
        step: Steps done of this phase.
        steps: Steps of this phase.
        first_step: Steps of this phase that an earlier run did.
        record: The latest step.
        loss: The latest loss that was read.
        finished: The last epochs.
        best: The best epoch.
        epoch_seconds: What the last whole epochs took, evaluation and saving included.
        over: Whether the run has ended, and no bars are drawn any more.
        now: The current time in s, on the clock of the next two.
        epoch_began: When the current epoch began.
        phase_began: When the current phase began.
    """

    epochs: int = 0
    epoch: int = 0
    phase: str = "train"
    step: int = 0
    steps: int = 0
    first_step: int = 0
    record: StepRecord | None = None
    loss: float | None = None
    finished: deque[EpochRecord] = field(default_factory=lambda: deque(maxlen=SHOWN_EPOCHS))
    best: EpochRecord | None = None
    epoch_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SHOWN_EPOCHS))
    over: bool = False
    now: float = 0.0
    epoch_began: float = 0.0
    phase_began: float = 0.0

    def phase_left(self) -> float | None:
        """Return the seconds that this phase still takes; None before its first step."""
        done = self.step - self.first_step
        if done <= 0:
            return None
        return (self.now - self.phase_began) / done * (self.steps - self.step)

    def run_left(self) -> float | None:
        """Return the seconds that the run still takes; None while nothing tells.

        The mean of the last epochs tells; before there is one, the current epoch's training so far.
        """
        if self.epoch_seconds:
            whole = sum(self.epoch_seconds) / len(self.epoch_seconds)
            here = max(0.0, whole - (self.now - self.epoch_began))
            return here + (self.epochs - self.epoch) * whole
        phase_left = self.phase_left()
        if phase_left is None or self.phase != "train":
            return None
        whole = (self.now - self.phase_began) / (self.step - self.first_step) * self.steps
        return phase_left + (self.epochs - self.epoch) * whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table, then, while the run goes on, the bars and the figures."""
        rows = list(self.finished)[-max(1, console.height - _LINES_BESIDE_TABLE) :]
        if rows:
            yield _epoch_table(rows, self.best, options.max_width)
        if not self.over:
            yield self._bars()
            yield self._figures()

    def _bars(self) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        share = self.step / self.steps if self.steps else 0.0
        whole = self.epoch - 1 + (share if self.phase == "train" else 1.0)
        for name, done, of, completed, left in (
            ("epoch", self.epoch, self.epochs, whole, self.run_left()),
            (self.phase, self.step, self.steps, self.step, self.phase_left()),
        ):
            ends = _UNKNOWN if left is None else clock(left)
            grid.add_row(
                name,
                f"{done}/{of}",
                ProgressBar(total=max(of, 1), completed=completed),
                f"ETA {ends:>7}",
            )
        return grid

    def _figures(self) -> Text:
        parts = ["loss " + (_UNKNOWN if self.loss is None else f"{self.loss:.4g}")]
        if self.record is not None:
            if self.record.lr is not None:
                parts.append(f"lr {self.record.lr:.4g}")
            parts.append(f"{self.record.images_per_s:,.0f} images/s")
            parts.append(f"data wait {self.record.data_wait:.0%}")
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis", style="dim")


def _epoch_table(rows: list[EpochRecord], best: EpochRecord | None, width: int) -> Table:
    """Return a table of epochs; a best one that is not among them stands first."""
    if best is not None and all(row.epoch != best.epoch for row in rows):
        rows = [best, *rows[1:]]
    columns = _columns("loss_val" in rows[-1].values, width)
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for header, _, _ in columns:
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    table.add_column("", no_wrap=True)
    for row in rows:
        is_best = best is not None and row.epoch == best.epoch
        cells = [_cell(row, key, form) for _, key, form in columns]
        table.add_row(*cells, "best" if is_best else "", style="green" if is_best else None)
    return table


def _columns(validates: bool, width: int) -> list[tuple[str, str, str]]:
    """Return header, key and format of the columns that fit a width."""
    columns = [("epoch", "epoch", "d"), ("train\nloss", "loss_train", ".4f")]
    if validates:
        columns.append(("val\nloss", "loss_val", ".4f"))
    if not validates or width >= _WIDE:
        columns.append(("train\ntop-1", "top1_train", ".2f"))
    part = "val" if validates else "train"
    if validates:
        columns.append(("val\ntop-1", "top1_val", ".2f"))
    columns.append((f"{part}\ntop-5", f"top5_{part}", ".2f"))
    columns.append(("\nlr", "lr", ".3g"))
    if width >= _WIDE:
        columns.append(("\ntime", "seconds", "clock"))
    columns.append(("images\n/s", "images_per_s", ",.0f"))
    return columns


def _cell(row: EpochRecord, key: str, form: str) -> str:
    if key == "epoch":
        return str(row.epoch)
    value = row.values.get(key, row.timing.get(key))
    if value is None:
        return _UNKNOWN
    return clock(value) if form == "clock" else format(value, form)
