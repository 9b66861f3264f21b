"""Tables: drawn to fit on a terminal, plain aligned text in a pipe."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from sanctl.report.console import is_live, out, printable
from sanctl.report.records import ClassScore, OverallScore

Cell = str | int | float | None

_EMPTY = "-"
_GAP = "  "
_SHOWN_CLASSES = 20


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    title: str | None = None,
    console: Console = out,
) -> None:
    """Print a table.

    On a terminal it is drawn to fit the width: long texts are folded, and thousands are set
    apart. In a pipe every row is one untruncated line, and numbers are plain. Columns that hold
    only numbers (also numbers as text, and `n/a`) stand to the right. Floats show four significant
    digits, so a column with a form of its own takes text. None and empty texts show as `-`.

    Args:
        columns: The headers.
        rows: The cells of each row, as many as there are headers.
        title: A line above the table.
        console: Where to print.

    Raises:
        ValueError: A row has more or fewer cells than there are headers.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(columns)} columns, but a row of {len(row)} cells: {row}")
    live = is_live(console)
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    texts = [[_text(cell, live) for cell in row] for row in rows]
    if title is not None:
        console.print(printable(title), style="bold")
    draw = _print_drawn if live else _print_plain
    draw(columns, texts, right, console)


def print_scores(
    overall: OverallScore,
    classes: Sequence[ClassScore],
    csv_path: Path,
    console: Console = out,
) -> None:
    """Print the scores of a test: overall, then per class.

    Of more than twenty classes the ten worst and the ten best are shown.

    Args:
        overall: The scores over all images.
        classes: The scores of each class that has images.
        csv_path: The file that holds every class.
        console: Where to print.
    """
    rows: list[tuple[str, Cell]] = [
        ("images", overall.images),
        ("loss", f"{overall.loss:.4f}"),
        ("top-1 %", f"{overall.top1:.2f}"),
        ("top-5 %", f"{overall.top5:.2f}"),
        ("mean IoU", f"{overall.mean_iou:.4f}"),
        ("mean class accuracy", f"{overall.mean_accuracy:.4f}"),
        ("overall accuracy", f"{overall.accuracy:.4f}"),
    ]
    print_table(["score", "value"], rows, console=console)
    console.print()
    per_class_table(classes, csv_path, console)


def per_class_table(classes: Sequence[ClassScore], csv_path: Path, console: Console = out) -> None:
    """Print the scores per class: all in their order, or of many the worst and the best.

    Args:
        classes: The scores of each class that has images.
        csv_path: The file that holds every class.
        console: Where to print.
    """
    if len(classes) <= _SHOWN_CLASSES:
        _class_rows("Per class", classes, console)
        return
    ranked = sorted(classes, key=lambda score: (score.top1, score.iou, score.name))
    half = _SHOWN_CLASSES // 2
    _class_rows(f"The {half} worst of {len(classes):,} classes", ranked[:half], console)
    console.print()
    _class_rows(f"The {half} best", ranked[: -half - 1 : -1], console)
    console.print(f"Every class is in {csv_path}")


def _class_rows(title: str, classes: Sequence[ClassScore], console: Console) -> None:
    rows = [
        (score.name, score.images, f"{score.top1:.2f}", f"{score.top5:.2f}", f"{score.iou:.4f}")
        for score in classes
    ]
    print_table(
        ["class", "images", "top-1 %", "top-5 %", "IoU"], rows, title=title, console=console
    )


def _is_number(cell: Cell) -> bool:
    if not isinstance(cell, str) or cell in ("", _EMPTY, "n/a"):
        return True
    try:
        float(cell.rstrip(" %").replace(",", ""))
    except ValueError:
        return False
    return True


def _text(cell: Cell, grouped: bool) -> str:
    if cell is None or cell == "":
        return _EMPTY
    if isinstance(cell, str):
        return printable(cell)
    if isinstance(cell, int):
        return f"{cell:,}" if grouped else str(cell)
    return f"{cell:.4g}"


def _print_drawn(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], console: Console
) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for header, to_right in zip(columns, right, strict=True):
        if to_right:
            table.add_column(header, justify="right", no_wrap=True, overflow="ellipsis")
        else:
            table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)


def _print_plain(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], console: Console
) -> None:
    lines = [list(columns), *rows]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = []
        for text, width, to_right in zip(line, widths, right, strict=True):
            blanks = " " * (width - cell_len(text))
            cells.append(blanks + text if to_right else text + blanks)
        console.print(_GAP.join(cells).rstrip())
