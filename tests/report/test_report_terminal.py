"""The run on a terminal: what stands on the screen, at several widths, and how it is drawn."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from report_screen import Screen
from rich.console import Console

from sanctl.report.records import StepRecord
from sanctl.report.reporter import CompositeReporter, Reporter
from sanctl.report.terminal import TerminalReporter

Play = Callable[..., None]
NEVER = 1e6  # s from one drawing of the reporter's own to the next


class Terminal:
    """A terminal reporter with its own clock, which draws when told to, and what it has drawn."""

    def __init__(self, width: int = 80, height: int = 40) -> None:
        self.file = io.StringIO()
        self.width = width
        self.time = 0.0
        self.console = Console(
            file=self.file,
            force_terminal=True,
            color_system="standard",
            width=width,
            height=height,
            soft_wrap=True,
            _environ={},
        )
        self.reporter = TerminalReporter(self.console, lambda: self.time, NEVER)

    def tick(self, epoch: int, step: int) -> None:
        """A second passes."""
        self.time += 1.0

    def look(self) -> str:
        """Draw, and return what stands on the screen."""
        self.reporter.draw()
        return self.screen().text()

    def screen(self) -> Screen:
        screen = Screen(self.width)
        screen.feed(self.file.getvalue())
        return screen


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_finished_run_leaves_its_last_epochs_and_the_best(
    play: Play, tmp_path: Path, width: int
) -> None:
    terminal = Terminal(width)
    play(terminal.reporter, Path("exp"), at_step=terminal.tick)

    screen = terminal.screen()
    assert max(len(line.rstrip()) for line in screen.lines) <= width
    text = screen.text()
    rows = re.findall(r"^ +(\d+)  .*$", text, re.MULTILINE)
    assert rows == ["3", "6", "7", "8", "9", "10", "11", "12"]
    (best,) = re.findall(r"^.*best$", text, re.MULTILINE)
    assert best.split()[:3] == ["3", "0.1111", "0.1111"]
    assert ("1:05" in best) == (width >= 80)
    assert ("25%" in best) == (width == 120)
    assert "san10_pairwise (10,512,345 parameters) on sketch_eitz" in text.replace("\n", " ")
    assert "trained in 1:02:05; best epoch 3, top-1 73.00 %; see exp" in text
    assert "ETA" not in text
    assert screen.shows_cursor


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_and_figures_while_it_runs(play: Play, tmp_path: Path, width: int) -> None:
    terminal = Terminal(width)
    shown: dict[tuple[int, int], str] = {}

    def look(epoch: int, step: int) -> None:
        terminal.tick(epoch, step)
        if (epoch, step) in {(1, 4), (4, 3), (12, 5)}:
            shown[epoch, step] = terminal.look()

    play(terminal.reporter, tmp_path, at_step=look)

    first = shown[1, 4].splitlines()[-3:]
    assert re.match(r"epoch 1/12 .* ETA +0:56$", first[0])  # a second per step: 12 * 5 - 4
    assert re.match(r"train +3/5 .* ETA +0:01$", first[1])
    assert first[2].startswith("loss 2.5  lr 0.1  321 images/s  data wait 12%")
    later = shown[4, 3].splitlines()[-3:]
    assert re.match(r"epoch 4/12 .* ETA +0:42$", later[0])  # nine epochs of 5 s, 3 s done
    assert len(re.findall("^epoch .*ETA", shown[12, 5], re.MULTILINE)) == 1
    for text in shown.values():
        assert max(map(len, text.splitlines())) <= width


def test_what_a_library_logs_appears_above_the_bars(play: Play, tmp_path: Path) -> None:
    logger, handler = logging.getLogger("of.a.library"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    terminal = Terminal()

    def log(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 4):
            terminal.look()
            logger.warning("a remark")
            text = terminal.look()
            assert text.index("\na remark\n") < text.index("\nepoch 1/12")
            assert len(re.findall("^(?:epoch|train) .*ETA", text, re.MULTILINE)) == 2

    try:
        play(terminal.reporter, tmp_path, at_step=log)
    finally:
        logger.removeHandler(handler)
    assert "a remark" in terminal.screen().text()


def test_the_evaluation_has_its_own_bar(play: Play, tmp_path: Path) -> None:
    terminal = Terminal()
    texts: list[str] = []

    class Slow(Reporter):
        """Stands behind the terminal, and looks at it after an evaluation's first step."""

        def evaluation_started(self, steps: int) -> None:
            terminal.time += 3.0

        def evaluation_step(self, record: StepRecord) -> None:
            texts.append(terminal.look())

    play(CompositeReporter([terminal.reporter, Slow()]), tmp_path, last=1)
    assert re.search(r"^val +1/2 .* ETA +0:03$", texts[0], re.MULTILINE)


def test_a_run_without_validation_shows_its_training_scores(play: Play, tmp_path: Path) -> None:
    terminal = Terminal()
    play(terminal.reporter, tmp_path, validates=False)
    text = terminal.screen().text()
    assert "train" in text
    assert not re.search(r"\bval\b", text)
    assert re.search(r"^ +12  0.0278  82.00  92.00 ", text, re.MULTILINE)


@pytest.mark.parametrize(("height", "epochs"), [(8, ["3", "10", "11"]), (5, []), (3, [])])
def test_a_low_terminal_shows_fewer_epochs_and_keeps_the_bars(
    play: Play, tmp_path: Path, height: int, epochs: list[str]
) -> None:
    terminal = Terminal(height=height)

    def look(epoch: int, step: int) -> None:
        if (epoch, step) == (12, 1):
            drawn = terminal.look().splitlines()[-height:]
            assert re.findall(r"^ +(\d+)  ", "\n".join(drawn), re.MULTILINE) == epochs
            assert drawn[-3].startswith("epoch 12/12 ")

    play(terminal.reporter, tmp_path, at_step=look)


def test_a_loss_that_is_far_off_stays_short(play: Play, tmp_path: Path) -> None:
    terminal = Terminal(120)
    play(terminal.reporter, tmp_path, shift=1031926248.0)
    rows = re.findall(r"^ +\d+  .*$", terminal.screen().text(), re.MULTILINE)
    assert [row.split()[1:3] for row in rows] == [["1.03e+09", "1.03e+09"]] * 8


def test_notes_stand_above_in_their_order(play: Play, tmp_path: Path) -> None:
    terminal = Terminal()

    def note(epoch: int, step: int) -> None:
        if step == 2:
            terminal.reporter.note(f"note [{epoch}] /a/[b]/c")

    play(terminal.reporter, tmp_path, at_step=note)
    text = terminal.screen().text()
    assert re.findall(r"note \[(\d+)\] /a/\[b\]/c$", text, re.MULTILINE) == [
        str(epoch) for epoch in range(1, 13)
    ]
    assert text.index("note [12]") < text.index("epoch    loss")


def test_a_step_only_notes_its_record(tmp_path: Path, play: Play) -> None:
    terminal = Terminal()
    drawn: list[int] = []

    def measure(epoch: int, step: int) -> None:
        drawn.append(len(terminal.file.getvalue()))

    play(terminal.reporter, tmp_path, last=3, at_step=measure)
    assert len(set(drawn)) == 1


def test_it_draws_by_itself_while_a_step_takes_long(tmp_path: Path, play: Play) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=40, _environ={})

    def wait(epoch: int, step: int) -> None:
        if step == 3:
            deadline = time.monotonic() + 60
            while f"{epoch}/12" not in file.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert f"{epoch}/12" in file.getvalue()

    play(TerminalReporter(console), tmp_path, last=3, at_step=wait)


def test_a_drawing_is_one_write(tmp_path: Path, play: Play) -> None:
    """Erasing and writing in one go is what keeps it from flickering."""
    terminal = Terminal()
    writes: list[str] = []
    write = terminal.file.write
    terminal.file.write = lambda text: writes.append(text) or write(text)  # type: ignore[method-assign,func-returns-value]
    play(terminal.reporter, tmp_path, last=3, at_step=lambda *_: terminal.reporter.draw())
    erasing = [text for text in writes if "\x1b[2K" in text]
    assert len(erasing) > 10
    assert all("epoch" in text for text in erasing)


@pytest.mark.parametrize("width", [61, 79, 100])
def test_a_terminal_of_another_size_is_drawn_afresh(tmp_path: Path, play: Play, width: int) -> None:
    terminal = Terminal(120)
    screens: list[list[str]] = []

    def resize(epoch: int, step: int) -> None:
        if (epoch, step) == (4, 2):
            terminal.reporter.note("a note")
            terminal.reporter.draw()
            screen = terminal.screen()
            screen.resize(width)
            terminal.console.width = width
            before = len(terminal.file.getvalue())
            terminal.reporter.draw()
            terminal.reporter.draw()
            screen.feed(terminal.file.getvalue()[before:])
            screens.append(screen.text().rstrip().splitlines())

    play(terminal.reporter, Path("exp"), at_step=resize)
    (lines,) = screens
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if " ETA " in line] == ["epoch", "train"]
    assert [line for line in lines if "note" in line] == ["a note"]
    assert sum("top-1" in line for line in lines) == 1
    assert lines[0].startswith("san10_pairwise (10,512,345 parameters)")
    assert lines.count("writes to exp") == 1


def test_training_goes_on_when_the_terminal_goes_away(tmp_path: Path, play: Play) -> None:
    leader, follower = pty.openpty()
    stdout = sys.stdout
    file = os.fdopen(follower, "w")
    console = Console(file=file, force_terminal=True, width=80, height=40, _environ={})
    reporter = TerminalReporter(console, seconds_between_drawings=NEVER)
    seen: list[tuple[int, int]] = []

    def leave(epoch: int, step: int) -> None:
        if (epoch, step) == (2, 2):
            os.close(leader)
        reporter.draw()
        reporter.note("a note")
        seen.append((epoch, step))

    play(reporter, tmp_path, at_step=leave)
    assert seen[-1] == (12, 5)
    assert sys.stdout is stdout
    with pytest.raises(OSError, match="Input/output error"):
        file.close()


def test_a_process_forked_while_another_thread_draws_can_write(tmp_path: Path) -> None:
    """Data workers are forked at any moment; a lock held by the drawing thread would stay held."""
    program = """
        import io, os, sys
        from pathlib import Path
        from rich.console import Console
        from sanctl.report.records import RunInfo
        from sanctl.report.terminal import TerminalReporter

        file = open(os.devnull, "w")
        console = Console(file=file, force_terminal=True, width=80, height=40)
        reporter = TerminalReporter(console, seconds_between_drawings=0.001)
        reporter.run_started(
            RunInfo("a", "b", "c", 1, 10, 60, 10, "cpu", "float32", 2, 1, 4, 16, Path("exp"))
        )
        sys.setswitchinterval(1e-5)
        for _ in range(200):
            child = os.fork()
            if not child:
                reporter.note("from the child")
                file.flush()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        reporter.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_after_a_failure_gives_the_cursor_back(play: Play, tmp_path: Path) -> None:
    terminal = Terminal()

    def fail(epoch: int, step: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(terminal.reporter, tmp_path, at_step=fail)
    assert not terminal.screen().shows_cursor
    terminal.reporter.close()
    terminal.reporter.close()
    assert terminal.screen().shows_cursor
