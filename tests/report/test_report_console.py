"""What reaches a real terminal, a dumb one and a pipe."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_screen import Screen, on_terminal

from sanctl.report.console import clock, make_console, printable

CSI = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])")

RUN = """
    import time
    from pathlib import Path
    from sanctl.report.create import create_reporter
    from sanctl.report.records import EpochRecord, RunInfo, RunSummary, StepRecord
    from sanctl.report.style import ProgressStyle

    folder = Path({folder!r})
    reporter = create_reporter(folder, 2, ProgressStyle({style!r}))
    reporter.run_started(
        RunInfo("mnist", "a", "san10", 1000, 10, 60, 10, "cpu", "float32", 2, 1, 4, 16, folder)
    )
    for epoch in (1, 2):
        reporter.epoch_started(epoch, 4, 0)
        for step in range(1, 5):
            reporter.step(StepRecord(epoch, 2, step, 4, 10.0, 0.0, 2.0, 0.1))
        values = {{"epoch": epoch, "lr": 0.1, "loss_train": 2.0, "top1_train": 50.0,
                  "top5_train": 90.0, "loss_val": 1.0, "top1_val": 60.0, "top5_val": 95.0}}
        reporter.epoch_finished(EpochRecord(epoch, 2, values, epoch == 2))
    reporter.run_finished(RunSummary(2, 60.0, 1.0, folder))
    reporter.close()
"""

PROGRESS = """
    from sanctl.report.console import err, out, progress
    with progress("packing", 300) as advance:
        for _ in range(100):
            advance(3)
    with progress("indexing\\x1b[31m") as advance:
        advance()
    out.print("done " + "/folder" * 30, style="red")
"""


def in_pipe(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "40", **environment},
    )


def test_a_run_on_a_real_terminal(tmp_path: Path) -> None:
    written = on_terminal(RUN.format(folder=str(tmp_path), style="auto"), width=70)
    screen = Screen(70)
    screen.feed(written)
    text = screen.text()
    assert re.search(r"^ +1  2.0000  1.0000 ", text, re.MULTILINE)
    assert re.search(r"^ +2  2.0000  1.0000 .* best$", text, re.MULTILINE)
    assert "best epoch 2, top-1 60.00 %" in text
    assert screen.shows_cursor
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {
        *("metrics", "train", "events")
    }


def test_a_run_in_a_pipe_is_plain_lines(tmp_path: Path) -> None:
    done = in_pipe(RUN.format(folder=str(tmp_path), style="auto"))
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("run", "train", "train", "epoch", "train", "train", "epoch", "done")
    ]
    assert all(line.isprintable() for line in lines)
    assert done.stderr == ""
    log = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log] == lines


@pytest.mark.parametrize(
    ("style", "words"),
    [("plain", "run train train epoch train train epoch done"), ("none", "trained")],
)
def test_a_terminal_gets_lines_where_these_are_asked_for(
    tmp_path: Path, style: str, words: str
) -> None:
    program = RUN.format(folder=str(tmp_path), style=style)
    written = on_terminal(program)
    assert "\x1b" not in written
    assert [line.split()[0] for line in written.splitlines()] == words.split()


def test_a_dumb_terminal_gets_plain_lines() -> None:
    written = on_terminal(PROGRESS, TERM="dumb")
    assert "\x1b" not in written
    assert re.match(r"packing: 300/300 in \d+\.\d s\r\n", written)


def test_no_color_leaves_colours_out() -> None:
    def colours(written: str) -> set[str]:
        codes = {a for a, command in CSI.findall(written) if command == "m"}
        return {code for a in codes for code in a.split(";") if re.fullmatch(r"[349]\d", code)}

    assert colours(on_terminal(PROGRESS))
    assert not colours(on_terminal(PROGRESS, NO_COLOR="1"))


def test_progress_on_a_terminal_is_a_bar_that_stays() -> None:
    screen = Screen(80)
    screen.feed(on_terminal(PROGRESS))
    first, second, *rest = screen.text().splitlines()
    assert re.match(r"packing ━+ 300/300 ", first)
    assert re.match(r"indexing\\x1b\[31m ━+ 1/1 ", second)
    assert max(len(first), len(second)) <= 80
    assert "".join(rest) == "done " + "/folder" * 30


def test_progress_in_a_pipe_is_a_line_on_stderr() -> None:
    done = in_pipe(PROGRESS)
    assert done.stdout == "done " + "/folder" * 30 + "\n"
    packing, indexing = done.stderr.splitlines()
    assert re.fullmatch(r"packing: 300/300 in \d+\.\d s", packing)
    assert re.fullmatch(r"indexing\\x1b\[31m: 1 in \d+\.\d s", indexing)


def test_forced_colours_do_not_bring_bars_into_a_pipe() -> None:
    done = in_pipe(PROGRESS, FORCE_COLOR="1")
    assert "\x1b" not in done.stderr


def test_progress_that_fails_says_nothing_more() -> None:
    program = """
        from sanctl.report.console import progress
        try:
            with progress("packing", 3) as advance:
                advance()
                raise ValueError
        except ValueError:
            pass
    """
    assert in_pipe(program).stderr == ""
    screen = Screen(80)
    screen.feed(on_terminal(program))
    assert re.match(r"packing .* 1/3 ", screen.text())
    assert screen.shows_cursor


@given(st.text(st.characters()))
def test_printable_text_is_printable_and_otherwise_unchanged(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()  # no half of a surrogate pair is left
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"), (360061, "100:01:01")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_console_takes_text_as_it_is() -> None:
    console = make_console()
    with console.capture() as capture:
        console.print("[red] :smile: " + "x" * 200)
    assert capture.get() == "[red] :smile: " + "x" * 200 + "\n"


def test_the_console_is_quick_to_import() -> None:
    """Commands import it before they know whether they will need anything heavy."""
    program = """
        import sys
        import sanctl.report.console, sanctl.report.tables, sanctl.report.records
        print(sorted({"torch", "numpy", "pandas", "matplotlib", "cv2"} & set(sys.modules)))
    """
    assert in_pipe(program).stdout == "[]\n"
