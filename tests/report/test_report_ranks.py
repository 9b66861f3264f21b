"""The processes of a run: who lags behind, and what a terminal of any size shows of them."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from sanctl.report.plain import PlainReporter
from sanctl.report.rankview import rank_lines
from sanctl.report.records import GpuReading, RankRecord, StepRecord
from sanctl.report.stragglers import find_stragglers
from sanctl.report.terminal import TerminalReporter

Play = Callable[..., None]
GIB = 2**30
GPU = GpuReading(97.0, int(100.5 * GIB), 140 * GIB, 690.0, 61.0)


def make_ranks(
    count: int, slow: Sequence[int] = (), waiting: Sequence[int] = (), gpu: GpuReading | None = GPU
) -> list[RankRecord]:
    return [
        RankRecord(
            rank,
            f"node{rank // 8:03}.cluster",
            f"NVIDIA H200 (cuda:{rank % 8})" if gpu else "CPU, 2 threads",
            7,
            2000.0 if rank in slow else 3000.0 + rank,
            0.5 if rank in waiting else 0.01,
            gpu,
        )
        for rank in range(count)
    ]


def texts(records: Sequence[RankRecord], width: int = 120, height: int = 40) -> list[str]:
    return [line.text for line in rank_lines(records, width, height)]


@pytest.mark.parametrize("count", [2, 3, 4, 64])
def test_a_straggler_is_slower_or_waits_more_than_most(count: int) -> None:
    assert find_stragglers(make_ranks(count)) == {}
    assert find_stragglers(make_ranks(count, slow=[1])) == {1: "slow"}
    assert find_stragglers(make_ranks(count, waiting=[0])) == {0: "waits"}
    assert find_stragglers(make_ranks(count, slow=[1], waiting=[1])) == {1: "slow"}


def test_a_single_rank_has_nobody_to_lag_behind() -> None:
    assert find_stragglers(make_ranks(1, slow=[0], waiting=[0])) == {}
    assert find_stragglers([]) == {}


def test_ranks_that_all_wait_are_no_stragglers() -> None:
    assert find_stragglers(make_ranks(8, waiting=range(8))) == {}


@pytest.mark.parametrize(
    ("speed", "wait", "found"),
    [(901.0, 0.29, {}), (899.0, 0.29, {1: "slow"}), (901.0, 0.31, {1: "waits"})],
)
def test_where_the_lines_are_drawn(speed: float, wait: float, found: dict[int, str]) -> None:
    records = [RankRecord(0, "a", "CPU", 1, 1000.0, 0.2), RankRecord(1, "a", "CPU", 1, speed, wait)]
    assert find_stragglers(records) == found


def test_every_rank_has_a_row_with_its_values() -> None:
    *header, first, second = texts(make_ranks(2, waiting=[1]))
    assert " ".join(header).split() == [
        *("GPU", "memory", "power", "temp", "images", "data"),
        *("rank", "host", "device", "use", "GiB", "W", "°C", "/s", "wait"),
    ]
    assert re.split("  +", first.strip()) == [
        *("0", "node000.cluster", "NVIDIA H200 (cuda:0)", "97%", "100.5/140", "690", "61"),
        *("3,000", "1%"),
    ]
    assert second.split()[-3:] == ["3,001", "50%", "waits"]


def test_on_a_cpu_the_columns_of_gpus_are_left_out() -> None:
    header = " ".join(texts(make_ranks(2, gpu=None))[:2]).split()
    assert header == ["images", "data", "rank", "host", "device", "/s", "wait"]


def test_what_a_gpu_does_not_tell_is_a_dash() -> None:
    silent = GpuReading(None, None, 140 * GIB, None, 50.0)
    (row,) = texts(make_ranks(1, gpu=silent))[2:]
    assert row.split()[-6:] == ["-", "-", "-", "50", "3,000", "1%"]
    lines = texts(make_ranks(30, gpu=silent), height=10)
    assert [line.split()[:5] for line in lines if line.strip().startswith("min")] == [
        ["min", "-", "-", "-", "50"]
    ]


@pytest.mark.parametrize(
    ("width", "missing"),
    [(100, []), (80, ["device"]), (72, ["device"]), (60, ["device", "power", "temp"])],
)
def test_narrow_terminals_drop_the_less_important_columns(width: int, missing: list[str]) -> None:
    lines = texts(make_ranks(8, slow=[3]), width)
    assert max(map(cell_len, lines)) <= width
    shown = " ".join(lines[:2]).split()
    words = ["rank", "host", "device", "use", "memory", "power", "temp", "images", "wait"]
    assert [word for word in words if word not in shown] == missing
    assert lines[5].split()[0] == "3"
    assert lines[5].endswith("slow")


def test_many_ranks_are_summed_up_and_the_stragglers_stand_out() -> None:
    title, _, _, *rows = texts(make_ranks(64, slow=[17], waiting=[40, 5]), height=12)
    assert title == "64 ranks on 8 hosts; slow: 17; waiting for data: 5, 40"
    assert [row.split()[0] for row in rows] == ["5", "17", "40", "min", "median", "max"]
    assert [row.split()[-1] for row in rows[:3]] == ["waits", "slow", "waits"]
    assert [row.split()[-2:] for row in rows[3:]] == [
        ["2,000", "1%"], ["3,032", "1%"], ["3,063", "50%"],
    ]  # fmt: skip


def test_more_stragglers_than_fit_are_counted() -> None:
    title, *lines = texts(make_ranks(64, slow=range(30)), height=12)
    assert title == "64 ranks on 8 hosts; slow: 0, 1, 2, 3, 4 and 25 more"
    assert [line.split()[0] for line in lines[2:]] == [
        *("0", "1", "2", "3", "4", "5"),
        *("min", "median", "max"),
    ]


@given(
    st.integers(1, 70),
    st.integers(1, 200),
    st.integers(-5, 80),
    st.sets(st.integers(0, 69)),
    st.text(max_size=30),
)
def test_any_size_is_kept_to(
    count: int, width: int, height: int, slow: set[int], host: str
) -> None:
    records = make_ranks(count, sorted(slow))
    records[0] = replace(records[0], host=host)
    lines = texts(records, width, height)
    assert len(lines) <= max(0, height)
    assert all(cell_len(line) <= width and line.isprintable() for line in lines)


@pytest.mark.parametrize("height", [12, 16, 24, 40, 90])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_screen_keeps_its_height_and_its_bars(
    play: Play, tmp_path: Path, width: int, height: int
) -> None:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, width=width, height=height, color_system=None, _environ={}
    )
    reporter = TerminalReporter(console, lambda: 0.0, 1e6)
    drawn: list[str] = []

    def look(epoch: int, step: int) -> None:
        if step == 5:
            reporter.ranks(make_ranks(64, slow=[9]))
            before = len(file.getvalue())
            reporter.draw()
            drawn.append(re.sub(r"^(\r|\x1b\[[12][KA])*", "", file.getvalue()[before:]))

    play(reporter, tmp_path, at_step=look)
    for epoch, text in enumerate(drawn, start=1):
        lines = text.split("\n")
        assert len(lines) <= height
        assert max(map(cell_len, lines)) <= width
        assert lines[-3].startswith(f"epoch {epoch}/12 ")
        assert lines[-2].startswith("train ")
        if height < 90:
            assert sum("64 ranks on 8 hosts; slow: 9" in line for line in lines) == 1
        if height > 12:
            assert sum(line.endswith("slow") for line in lines) == 1
            assert any(line.startswith("median") for line in lines) == (height < 90)


def test_lines_of_steps_name_the_stragglers() -> None:
    lines: list[str] = []
    reporter = PlainReporter(1, lines.append)
    record = StepRecord(1, 2, 1, 9, 100.0, 0.0, 1.0, 0.1)
    reporter.ranks(make_ranks(12, slow=[10], waiting=[2]))
    reporter.step(record)
    reporter.ranks(make_ranks(12))
    reporter.step(record)
    assert lines[0].endswith(" data_wait=0 stragglers=2:waits,10:slow")
    assert lines[1].endswith(" data_wait=0")
    assert len(lines) == 2
