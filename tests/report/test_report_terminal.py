"""The run on a terminal: what stands on the screen, at several widths, and how it is drawn."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from report_screen import Screen
from rich.console import Console

from sanctl.report.records import StepRecord
from sanctl.report.reporter import CompositeReporter, Reporter
from sanctl.report.terminal import TerminalReporter

Play = Callable[..., None]


class Terminal:
    """A terminal reporter with its own clock, and what it has drawn."""

    def __init__(self, width: int = 80, height: int = 40) -> None:
        self.file = io.StringIO()
        self.width = width
        self.time = 0.0
        self.reporter = TerminalReporter(
            Console(
                file=self.file,
                force_terminal=True,
                color_system="standard",
                width=width,
                height=height,
                soft_wrap=True,
                _environ={},
            ),
            monotonic=lambda: self.time,
        )

    def tick(self, epoch: int, step: int) -> None:
        """A second passes."""
        self.time += 1.0

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
            shown[epoch, step] = terminal.screen().text()

    play(terminal.reporter, tmp_path, at_step=look)

    first = shown[1, 4].splitlines()[-3:]
    assert re.match(r"epoch 1/12 .* ETA +0:57$", first[0])  # a second per step: 12 * 5 - 3
    assert re.match(r"train +3/5 .* ETA +0:02$", first[1])
    assert first[2].startswith("loss 2.5  lr 0.1  321 images/s  data wait 12%")
    later = shown[4, 3].splitlines()[-3:]
    assert re.match(r"epoch 4/12 .* ETA +0:43$", later[0])  # nine epochs of 5 s, 2 s done
    assert len(re.findall("^epoch .*ETA", shown[12, 5], re.MULTILINE)) == 1
    for text in shown.values():
        assert max(map(len, text.splitlines())) <= width


def test_the_evaluation_has_its_own_bar(play: Play, tmp_path: Path) -> None:
    terminal = Terminal()
    texts: list[str] = []

    class Slow(Reporter):
        """Stands behind the terminal, and looks at it after an evaluation's first step."""

        def evaluation_started(self, steps: int) -> None:
            terminal.time += 3.0

        def evaluation_step(self, record: StepRecord) -> None:
            texts.append(terminal.screen().text())

    play(CompositeReporter([terminal.reporter, Slow()]), tmp_path, last=1)
    assert re.search(r"^val +1/2 .* ETA +0:03$", texts[0], re.MULTILINE)


def test_a_run_without_validation_shows_its_training_scores(play: Play, tmp_path: Path) -> None:
    terminal = Terminal()
    play(terminal.reporter, tmp_path, validates=False)
    text = terminal.screen().text()
    assert "train" in text
    assert not re.search(r"\bval\b", text)
    assert re.search(r"^ +12  0.0278  82.00  92.00 ", text, re.MULTILINE)


def test_a_low_terminal_shows_fewer_epochs(play: Play, tmp_path: Path) -> None:
    terminal = Terminal(height=11)
    play(terminal.reporter, tmp_path)
    rows = re.findall(r"^ +(\d+)  ", terminal.screen().text(), re.MULTILINE)
    assert rows == ["3", "11", "12"]


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


def test_steps_between_two_drawings_draw_nothing(tmp_path: Path, play: Play) -> None:
    terminal = Terminal()
    drawn: list[int] = []

    def measure(epoch: int, step: int) -> None:
        drawn.append(len(terminal.file.getvalue()))
        terminal.time += 0.1

    play(terminal.reporter, tmp_path, last=1, at_step=measure)
    before = [drawn[i] != drawn[i + 1] for i in range(len(drawn) - 1)]
    assert before == [False, False, True, False]


def test_a_drawing_is_one_write(tmp_path: Path, play: Play) -> None:
    """Erasing and writing in one go is what keeps it from flickering."""
    terminal = Terminal()
    writes: list[str] = []
    write = terminal.file.write
    terminal.file.write = lambda text: writes.append(text) or write(text)  # type: ignore[method-assign,func-returns-value]
    play(terminal.reporter, tmp_path, last=3, at_step=terminal.tick)
    erasing = [text for text in writes if "\x1b[2K" in text]
    assert len(erasing) > 10
    assert all("epoch" in text for text in erasing)


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
