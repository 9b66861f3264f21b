"""What the terminal shows of a run's processes: a row for each, or for many a summary."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sanctl.report.columns import UNKNOWN, Column, Line, table_lines
from sanctl.report.console import shorten
from sanctl.report.records import GpuReading, RankRecord
from sanctl.report.stragglers import SLOW, WAITS, find_stragglers

_GIB = 2**30
_HOST_LENGTH, _DEVICE_LENGTH = 16, 24
_HEADER_HEIGHT = 2
_NAMED = 5
_STRAGGLER, _SUMMARY = "yellow", "dim"
_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "median": statistics.median,
    "max": max,
}

Values = tuple[float | None, ...]


class _Measure(NamedTuple):
    """A column of numbers: its header, how to read and to write it, and its importance."""

    header: str
    read: Callable[[RankRecord], Values]
    form: str
    importance: int

    def cell(self, values: Values) -> str:
        return UNKNOWN if None in values else self.form.format(*values)

    def summary(self, records: Sequence[RankRecord], statistic: str) -> str:
        known = [values for values in map(self.read, records) if None not in values]
        if not known:
            return UNKNOWN
        # Of memory, used and total are each a list of their own.
        return self.form.format(*map(_STATISTICS[statistic], zip(*known, strict=True)))


def _of_gpu(read: Callable[[GpuReading], Values]) -> Callable[[RankRecord], Values]:
    return lambda record: (None,) if record.gpu is None else read(record.gpu)


def _memory(gpu: GpuReading) -> Values:
    if gpu.memory_used is None or gpu.memory_total is None:
        return (None,)
    return gpu.memory_used / _GIB, gpu.memory_total / _GIB


_GPU_MEASURES = (
    _Measure("GPU\nuse", _of_gpu(lambda gpu: (gpu.utilisation,)), "{:3.0f}%", 7),
    _Measure("memory\nGiB", _of_gpu(_memory), "{:.1f}/{:.0f}", 6),
    _Measure("power\nW", _of_gpu(lambda gpu: (gpu.power,)), "{:3.0f}", 3),
    _Measure("temp\n°C", _of_gpu(lambda gpu: (gpu.temperature,)), "{:3.0f}", 4),
)
_MEASURES = (
    _Measure("images\n/s", lambda record: (record.images_per_s,), "{:,.0f}", 9),
    _Measure("data\nwait", lambda record: (record.data_wait,), "{:4.0%}", 8),
)


def rank_lines(records: Sequence[RankRecord], width: int, height: int) -> list[Line]:
    """Lay out the processes: a row for each, stragglers marked, where so many rows fit.

    Where they do not, the stragglers are named and come first, as many as fit, before minimum,
    median and maximum of all.

    Args:
        records: All ranks of a run, in their order.
        width: The most cells of the terminal that a line may take.
        height: The most lines; few have room for how many lag behind alone, or for nothing.
    """
    stragglers = find_stragglers(records)
    if _HEADER_HEIGHT + len(records) <= height:
        return _table(records, stragglers, (), records, width)
    title = Line(_title(records, stragglers)[:width], _STRAGGLER if stragglers else "")
    rows_left = height - 1 - _HEADER_HEIGHT - len(_STATISTICS)
    if rows_left < 0:
        return [title] if height > 0 else []
    shown = [record for record in records if record.rank in stragglers][:rows_left]
    return [title, *_table(shown, stragglers, tuple(_STATISTICS), records, width)]


def _title(records: Sequence[RankRecord], stragglers: dict[int, str]) -> str:
    """Return how many ranks there are, and which of them lag behind."""
    hosts = len({record.host for record in records})
    parts = [f"{len(records)} ranks on {hosts} host{'s' if hosts > 1 else ''}"]
    for mark, words in ((SLOW, "slow"), (WAITS, "waiting for data")):
        ranks = sorted(rank for rank, how in stragglers.items() if how == mark)
        if ranks:
            names = ", ".join(map(str, ranks[:_NAMED]))
            more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
            parts.append(f"{words}: {names}{more}")
    return "; ".join(parts)


def _table(
    shown: Sequence[RankRecord],
    stragglers: dict[int, str],
    statistics: Sequence[str],
    records: Sequence[RankRecord],
    width: int,
) -> list[Line]:
    """Lay out a row for each rank shown, then one for each statistic of all records."""
    empty = [""] * len(statistics)
    hosts = [shorten(record.host, _HOST_LENGTH) for record in shown]
    devices = [shorten(record.device, _DEVICE_LENGTH) for record in shown]
    marks = [stragglers.get(record.rank, "") for record in shown]
    has_gpu = any(record.gpu is not None for record in records)
    columns = [
        Column("rank", [*(str(record.rank) for record in shown), *statistics], 11),
        Column("host", hosts + empty, 5, left=True),
        Column("device", devices + empty, 2, left=True),
        *(
            Column(
                measure.header,
                [measure.cell(measure.read(record)) for record in shown]
                + [measure.summary(records, statistic) for statistic in statistics],
                measure.importance,
            )
            for measure in (_GPU_MEASURES if has_gpu else ()) + _MEASURES
        ),
        # As wide with a mark as without: columns that come and go would be hard to read.
        Column("", [f"{mark:{len(WAITS)}}" for mark in marks + empty], 10, left=True),
    ]
    styles = [_STRAGGLER if mark else "" for mark in marks]
    return table_lines(columns, [*styles, *[_SUMMARY] * len(statistics)], width)
