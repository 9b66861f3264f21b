"""Tables on a terminal and in a pipe."""

import io
import os
import pty
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from sanctl.report.console import make_console
from sanctl.report.records import ClassScore, OverallScore
from sanctl.report.tables import Cell, per_class_table, print_scores, print_table

COLUMNS = ["class", "images", "share", "note"]
ROWS: list[list[Cell]] = [
    ["cat", 1234567, 0.123456, "a"],
    ["a very long name " * 8 + "[red]", 5, 12.0, None],
    ["\u732b\x1b[31m\n", 0, float("nan"), ""],
]
SGR = re.compile(r"\x1b\[[\d;]*m")


class InPipe:
    """A console whose output is no terminal."""

    def __init__(self) -> None:
        self.console = make_console()
        self.console.file = io.StringIO()

    def lines(self) -> list[str]:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue().splitlines()


class OnTerminal:
    """A console on a terminal of its own."""

    def __init__(self, width: int) -> None:
        self._leader, follower = pty.openpty()
        self.file = os.fdopen(follower, "w", encoding="utf-8")
        self.console = Console(
            file=self.file, width=width, soft_wrap=True, markup=False, _environ={"TERM": "xterm"}
        )

    def lines(self) -> list[str]:
        self.file.write("end\n")
        self.file.flush()
        written = b""
        while not written.endswith(b"end\r\n"):
            written += os.read(self._leader, 65536)
        return SGR.sub("", written.decode()).replace("\r", "").splitlines()[:-1]

    def close(self) -> None:
        self.file.close()
        os.close(self._leader)


@pytest.fixture(params=[60, 80, 120])
def terminal(request: pytest.FixtureRequest) -> Iterator[OnTerminal]:
    terminal = OnTerminal(request.param)
    yield terminal
    terminal.close()


def test_a_pipe_gets_one_whole_line_per_row() -> None:
    pipe = InPipe()
    print_table(COLUMNS, ROWS, title="Classes", console=pipe.console)

    lines = pipe.lines()
    assert lines[0] == "Classes"
    assert len(lines) == 5
    assert all(line.isprintable() for line in lines)
    assert [re.split(" {2,}", line) for line in lines[1:]] == [
        COLUMNS,
        ["cat", "1234567", "0.1235", "a"],
        [("a very long name " * 8 + "[red]"), "5", "12", "-"],
        ["\u732b\\x1b[31m\\n", "0", "nan", "-"],
    ]


def test_columns_are_aligned_in_a_pipe_with_wide_characters_too() -> None:
    pipe = InPipe()
    print_table(COLUMNS, ROWS, console=pipe.console)
    header, *rows = pipe.lines()
    for name, cells in (("images", ("1234567", "5", "0")), ("share", ("0.1235", "12", "nan"))):
        end = header.index(name) + len(name)
        for row, cell in zip(rows, cells, strict=True):
            before = re.match(rf".*?  {re.escape(cell)}(?= )", row)
            assert before is not None
            assert cell_len(before.group()) == end


def test_a_terminal_gets_every_character_within_its_width(terminal: OnTerminal) -> None:
    print_table(COLUMNS, ROWS, title="Classes", console=terminal.console)

    lines = terminal.lines()
    assert max(cell_len(line.rstrip()) for line in lines) <= terminal.console.width
    text = "\n".join(lines)
    assert "1,234,567" in text
    assert "\x1b" not in text
    letters = "".join(line.split("  ")[0] for line in lines).replace(" ", "")
    assert ("averylongname" * 8 + "[red]") in letters
    assert not re.search(r"\S…", text)


def test_numbers_as_text_stand_to_the_right() -> None:
    pipe = InPipe()
    rows = [["top-1", "9.5 %"], ["loss", "12.25"], ["top-5", "n/a"]]
    print_table(["score", "value"], rows, console=pipe.console)
    assert pipe.lines() == ["score  value", "top-1  9.5 %", "loss   12.25", "top-5    n/a"]


def test_a_table_without_rows_shows_its_headers() -> None:
    pipe = InPipe()
    print_table(["name", "size"], [], console=pipe.console)
    assert pipe.lines() == ["name  size"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 columns, but a row of 3 cells"):
        print_table(["a", "b"], [[1, 2, 3]])


def scores(count: int) -> list[ClassScore]:
    """Classes of which number i has top-1 i, in another order."""
    return [
        ClassScore(f"class{i}", images=10, top1=float(i), top5=99.0, iou=0.5)
        for i in sorted(range(count), key=lambda i: (i % 7, i))
    ]


def test_few_classes_are_all_shown_in_their_order() -> None:
    pipe = InPipe()
    per_class_table(scores(20), Path("test/per_class.csv"), pipe.console)
    names = [line.split()[0] for line in pipe.lines()[2:]]
    assert names == [score.name for score in scores(20)]
    assert "class3       10     3.00    99.00  0.5000" in pipe.lines()


def test_of_many_classes_the_worst_and_the_best_are_shown() -> None:
    pipe = InPipe()
    per_class_table(scores(250), Path("test/per_class.csv"), pipe.console)
    lines = pipe.lines()
    names = [line.split()[0] for line in lines if line.startswith("class") and "10 " in line]
    assert names == [f"class{i}" for i in [*range(10), *range(249, 239, -1)]]
    assert lines[0] == "The 10 worst of 250 classes"
    assert lines[-1] == "Every class is in test/per_class.csv"


def test_the_scores_of_a_test() -> None:
    pipe = InPipe()
    overall = OverallScore(4000, 1.23456, 71.5, 93.25, 0.55, 0.7, 0.715)
    print_scores(overall, scores(2), Path("per_class.csv"), pipe.console)
    assert dict(line.rsplit(None, 1) for line in pipe.lines()[1:8]) == {
        "images": "4000",
        "loss": "1.2346",
        "top-1 %": "71.50",
        "top-5 %": "93.25",
        "mean IoU": "0.5500",
        "mean class accuracy": "0.7000",
        "overall accuracy": "0.7150",
    }
