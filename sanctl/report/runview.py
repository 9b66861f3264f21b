"""What the terminal shows of a run: epochs, processes, two bars and the latest figures."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment

from sanctl.report.columns import UNKNOWN, Column, Line, table_lines
from sanctl.report.console import clock
from sanctl.report.rankview import rank_lines
from sanctl.report.records import EpochRecord, RankRecord, StepRecord

SHOWN_EPOCHS = 8
_EPOCHS_BEFORE_RANKS = 3  # so many are shown before processes get rows, on tall terminals
_EPOCH_HEADER = 2
_BAR_LINES = 3
_LEAST_BAR = 10
_LARGE_LOSS = 1000
_TALL = 20  # terminals so high keep what stands above in sight


@dataclass
class RunView:
    """The state of a run, drawn on demand to the width and height that there is.

    Attributes:
        header: Lines that stand above what is drawn, and that should stay on the screen.
        epochs: Last epoch of the run.
        epoch: The current epoch, counted from 1.
        phase: What the steps do: `train` or `val`.
        step: Steps done of this phase.
        steps: Steps of this phase.
        first_step: Steps of this phase that an earlier run did.
        record: The latest step.
        loss: The latest loss that was read.
        ranks: What each process did lately.
        finished: The last epochs.
        best: The best epoch.
        epoch_seconds: What the last whole epochs took, evaluation and saving included.
        over: Whether the run has ended, and only the epochs are drawn any more.
        now: The current time in s, on the clock of the next three.
        epoch_began: When the current epoch began.
        phase_began: When the current phase began.
        stepped: When its latest step was done.
    """

    header: tuple[str, ...] = ()
    epochs: int = 0
    epoch: int = 0
    phase: str = "train"
    step: int = 0
    steps: int = 0
    first_step: int = 0
    record: StepRecord | None = None
    loss: float | None = None
    ranks: Sequence[RankRecord] = ()
    finished: deque[EpochRecord] = field(default_factory=lambda: deque(maxlen=SHOWN_EPOCHS))
    best: EpochRecord | None = None
    epoch_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SHOWN_EPOCHS))
    over: bool = False
    now: float = 0.0
    epoch_began: float = 0.0
    phase_began: float = 0.0
    stepped: float = 0.0

    def phase_left(self) -> float | None:
        """Return the seconds that this phase still takes; None before its first step."""
        return self._left(0)

    def run_left(self) -> float | None:
        """Return the seconds that the run still takes; None while nothing tells.

        The mean of the last epochs tells; before there is one, the current epoch's training so far.
        """
        epochs_left = self.epochs - self.epoch
        if self.epoch_seconds:
            whole = sum(self.epoch_seconds) / len(self.epoch_seconds)
            return max(0.0, whole - (self.now - self.epoch_began)) + epochs_left * whole
        return self._left(epochs_left) if self.phase == "train" else None

    def _left(self, more_phases: int) -> float | None:
        """Return the seconds to the end of this phase and of as many whole ones like it."""
        done = self.step - self.first_step
        if done <= 0:
            return None
        step_seconds = (self.stepped - self.phase_began) / done
        steps_left = self.steps - self.step + more_phases * self.steps
        return max(0.0, step_seconds * steps_left - (self.now - self.stepped))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the epochs, then, while the run goes on, the processes, the bars and the figures."""
        width = options.max_width
        lines = self._at_the_end(width) if self.over else self._tables(width, console.height)
        for line in lines:
            yield Segment(line.text, console.get_style(line.style or "none"))
            yield Segment.line()
        if not self.over:
            yield from self._bars(console, options)
            yield Segment(self._figures()[:width], console.get_style("dim"))

    def _at_the_end(self, width: int) -> list[Line]:
        return self._epochs(width, _EPOCH_HEADER + SHOWN_EPOCHS)

    def _tables(self, width: int, height: int) -> list[Line]:
        """Lay out both tables in the room that the bars leave."""
        is_tall = height >= _TALL
        above = sum(max(1, -(-cell_len(line) // width)) for line in self.header)
        room = height - _BAR_LINES - (above if is_tall else 0)
        if not self.ranks:
            return self._epochs(width, room)
        room -= 2  # the lines between the tables and the bars
        epochs = min(len(self.finished), _EPOCHS_BEFORE_RANKS if is_tall else 1)
        kept = _EPOCH_HEADER + epochs if epochs else 0
        ranks = rank_lines(self.ranks, width, room - kept)
        epoch_lines = self._epochs(width, room - len(ranks))
        between = [Line("")] if ranks else []
        return [*epoch_lines, *(between if epoch_lines else ()), *ranks, *between]

    def _epochs(self, width: int, room: int) -> list[Line]:
        """Lay out the last epochs; a best one that is not among them stands first."""
        rows = list(self.finished)[-max(1, room - _EPOCH_HEADER) :]
        if not rows or room <= _EPOCH_HEADER:
            return []
        best = self.best
        if best is not None and all(row.epoch != best.epoch for row in rows):
            rows = [best, *rows[1:]]
        is_best = [best is not None and row.epoch == best.epoch for row in rows]
        styles = ["green" if here else "" for here in is_best]
        return table_lines(_epoch_columns(rows, is_best), styles, width)

    def _bars(self, console: Console, options: ConsoleOptions) -> RenderResult:
        share = self.step / self.steps if self.steps else 0.0
        whole = self.epoch - 1 + (share if self.phase == "train" else 1.0)
        counts = [f"{self.epoch}/{self.epochs}", f"{self.step}/{self.steps}"]
        count_width = max(map(len, counts))
        for name, count, of, completed, left in (
            ("epoch", counts[0], self.epochs, whole, self.run_left()),
            (self.phase, counts[1], self.steps, self.step, self.phase_left()),
        ):
            before = f"{name:5} {count:>{count_width}} "
            after = f" ETA {UNKNOWN if left is None else clock(left):>7}"
            bar = max(_LEAST_BAR, options.max_width - len(before) - len(after))
            yield Segment(before)
            yield from console.render(
                ProgressBar(total=max(of, 1), completed=completed, width=bar), options
            )
            yield Segment(after)
            yield Segment.line()

    def _figures(self) -> str:
        parts = ["loss " + (UNKNOWN if self.loss is None else f"{self.loss:.4g}")]
        if self.record is not None:
            if self.record.lr is not None:
                parts.append(f"lr {self.record.lr:.4g}")
            parts.append(f"{self.record.images_per_s:,.0f} images/s")
            parts.append(f"data wait {self.record.data_wait:.0%}")
        return "  ".join(parts)


def _epoch_columns(rows: Sequence[EpochRecord], is_best: Sequence[bool]) -> list[Column]:
    validates = "loss_val" in rows[-1].values
    parts = {"train": 0, "val": 5} if validates else {"train": 5}
    scores = [
        Column(f"{part}\n{header}", _cells(rows, f"{key}_{part}", form), importance + more)
        for key, header, form, importance in (
            ("loss", "loss", ".4f", 5),
            ("top1", "top-1", ".2f", 4),
            ("top5", "top-5", ".2f", 3),
        )
        for part, more in parts.items()
    ]
    return [
        Column("epoch", [str(row.epoch) for row in rows], 11),
        *scores,
        Column("lr", _cells(rows, "lr", ".3g"), 6),
        Column("time", [clock(row.timing.get("seconds", 0.0)) for row in rows], 2),
        Column("data\nwait", _cells(rows, "data_wait", ".0%"), 1),
        Column("images\n/s", _cells(rows, "images_per_s", ",.0f"), 7),
        Column("", ["best" if here else "    " for here in is_best], 10, left=True),
    ]


def _cells(rows: Sequence[EpochRecord], key: str, form: str) -> list[str]:
    values = [row.values.get(key, row.timing.get(key)) for row in rows]
    return [_text(value, form) for value in values]


def _text(value: float | None, form: str) -> str:
    if value is None:
        return UNKNOWN
    # A loss that is far off would take the room of two columns.
    return format(value, ".3g" if form == ".4f" and abs(value) >= _LARGE_LOSS else form)
