"""The run as key=value lines: in a pipe, and in train.log."""

import re
import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanctl.report.plain import PlainReporter, key_values
from sanctl.report.reporter import CompositeReporter
from sanctl.report.textlog import TextLogReporter

Play = Callable[..., None]


def lines_of(play: Play, folder: Path, print_freq: int, **how: int) -> list[str]:
    lines: list[str] = []
    play(PlainReporter(print_freq, lines.append), folder, **how)
    return lines


def parse(line: str) -> tuple[str, dict[str, str]]:
    word, *pairs = shlex.split(line)
    return word, dict(pair.split("=", 1) for pair in pairs)


def test_a_run_gives_one_line_per_print_freq_steps_and_per_epoch(
    play: Play, tmp_path: Path
) -> None:
    parsed = [parse(line) for line in lines_of(play, tmp_path, 2)]

    steps = [(v["epoch"], v["step"]) for word, v in parsed if word == "train"]
    assert steps[:6] == [("1", "2"), ("1", "4"), ("1", "5"), ("2", "2"), ("2", "4"), ("2", "5")]
    assert [v["step"] for word, v in parsed if word == "val"] == ["2"] * 12
    assert [v["epoch"] for word, v in parsed if word == "epoch"] == [str(e) for e in range(1, 13)]
    assert parsed[0][0] == "run"
    assert parsed[-1][0] == "done"


def test_values_and_their_order(play: Play, tmp_path: Path) -> None:
    lines = lines_of(play, tmp_path, 2, first=3, last=3)

    assert 'name="small san"' in lines[0]
    assert "parameters=10512345" in lines[0]
    assert lines[1] == (
        "train epoch=3 epochs=12 step=2 steps=5 loss=2.5 lr=0.1 images_per_s=321 data_wait=0.125"
    )
    assert lines[4] == "val epoch=3 epochs=12 step=2 steps=2 loss=- images_per_s=999 data_wait=0.5"
    word, values = parse(lines[5])
    assert list(values)[:5] == ["epoch", "epochs", "best", "lr", "loss_train"]
    assert list(values)[-3:] == ["seconds", "images_per_s", "data_wait"]
    assert (word, values["best"], values["top1_val"]) == ("epoch", "true", "73")


def test_a_note_stays_on_one_line_without_control_characters(tmp_path: Path) -> None:
    lines: list[str] = []
    PlainReporter(1, lines.append).note("bad\nname \x1b[31m")
    assert lines == ["note bad\\nname \\x1b[31m"]


@given(st.text())
def test_any_text_gives_one_printable_line_with_one_value(text: str) -> None:
    line = key_values("run", {"name": text, "after": 1})
    assert line.isprintable()
    assert line.endswith(" after=1")
    assert re.fullmatch(r'run name=("(\\.|[^"\\])*"|[^ "=]+) after=1', line)


def test_lines_reach_stdout_at_once(
    play: Play, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    PlainReporter(1).note("x" * 300)
    assert capfd.readouterr().out == "note " + "x" * 300 + "\n"


def test_the_log_has_a_time_on_every_line_and_goes_on_after_a_resume(
    play: Play, tmp_path: Path
) -> None:
    log = tmp_path / "run" / "train.log"
    play(TextLogReporter(log, 2, pytest.fail), tmp_path, last=2)
    before = log.read_text()
    play(TextLogReporter(log, 2, pytest.fail), tmp_path, first=2)

    text = log.read_text()
    assert text.startswith(before)
    for line in text.splitlines():
        time, word = line.split()[:2]
        assert datetime.fromisoformat(time).tzinfo is not None
        assert word in {"run", "train", "val", "epoch", "done"}
    assert text.count(" run ") == 2


def test_a_log_that_cannot_be_written_warns_once_and_recovers(play: Play, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.write_text("a file where the folder should be")
    warnings: list[str] = []
    reporter = TextLogReporter(folder / "train.log", 1, warnings.append)

    play(reporter, tmp_path, last=2)
    assert len(warnings) == 1
    assert "train.log" in warnings[0]
    assert "training goes on" in warnings[0]

    folder.unlink()
    reporter.note("again")
    assert (folder / "train.log").read_text().endswith("note again\n")


def test_a_composite_tells_all_and_closes_all(play: Play, tmp_path: Path) -> None:
    first: list[str] = []
    second: list[str] = []
    closed: list[str] = []

    class Closing(PlainReporter):
        def close(self) -> None:
            closed.append("closed")
            raise OSError("no space")

    reporters = [Closing(1, first.append), Closing(1, second.append)]
    with pytest.raises(OSError, match="no space"):
        play(CompositeReporter(reporters), tmp_path, last=1)
    assert first == second
    assert first
    assert closed == ["closed", "closed"]
