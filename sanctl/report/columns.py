"""Tables that are redrawn often: as many columns as fit a width, the more important ones first."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len

GAP = "  "
UNKNOWN = "-"


class Line(NamedTuple):
    """A line to draw: its text, and rich's name of its style."""

    text: str
    style: str = ""


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        header: Its header, one or more lines, of which the last stands above the cells.
        cells: Its cells, from the top.
        importance: Of columns that do not all fit, the one with the lowest is left out first.
        left: Whether it stands to the left, as words do.
    """

    header: str
    cells: Sequence[str]
    importance: int
    left: bool = False


def fit_columns(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit side by side, in their order; at least one."""
    kept = list(columns)
    while len(kept) > 1 and sum(map(_width, kept)) + len(GAP) * (len(kept) - 1) > width:
        kept.remove(min(kept, key=lambda column: column.importance))
    return kept


def table_lines(columns: Sequence[Column], styles: Sequence[str], width: int) -> list[Line]:
    """Lay out a table: its headers, then its rows, cut at the width.

    Args:
        columns: The columns, of as many cells as there are rows.
        styles: The style of each row, as rich names it.
        width: The most cells of the terminal that a line may take.
    """
    kept = fit_columns(columns, width)
    headers = [column.header.split("\n") for column in kept]
    height = max(map(len, headers))
    padded = [[""] * (height - len(header)) + header for header in headers]
    laid_out = [
        _aligned([*header, *column.cells], column)
        for header, column in zip(padded, kept, strict=True)
    ]
    texts = [GAP.join(row).rstrip()[:width] for row in zip(*laid_out, strict=True)]
    return [Line(*line) for line in zip(texts, [*["bold"] * height, *styles], strict=True)]


def _width(column: Column) -> int:
    return max(map(cell_len, (*column.header.split("\n"), *column.cells)))


def _aligned(texts: Sequence[str], column: Column) -> list[str]:
    width = _width(column)
    blanks = [" " * (width - cell_len(text)) for text in texts]
    if column.left:
        return [text + blank for text, blank in zip(texts, blanks, strict=True)]
    return [blank + text for text, blank in zip(texts, blanks, strict=True)]
