"""The consoles that every command prints to, and a progress bar that is quiet in a pipe.

`out` takes results, `err` progress and notes; `silent` drops what it is given. They print text as
it is: no markup, no emoji codes, no highlighting (file and class names hold anything), and no
wrapping of their own, so that a path stays in one piece. Styles come from `style=` or from a
`rich.text.Text`.
"""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from sanctl.errors import UserError
from sanctl.report.streams import log_above_drawings

Advance = Callable[..., None]
"""`advance(n=1)`: n more items are done."""

_FIRST_LINE_AFTER = 10.0


def make_console(stderr: bool = False) -> Console:
    """Return a console that prints text as it is."""
    return Console(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)


out = make_console()
err = make_console(stderr=True)
silent = Console(file=io.StringIO(), quiet=True)


def is_live(console: Console) -> bool:
    """Return whether a console can redraw: a terminal that understands cursor movement."""
    return console.file.isatty() and not console.is_dumb_terminal


def require_live() -> None:
    """Make sure that stdout can be drawn on.

    Raises:
        UserError: It cannot.
    """
    if not is_live(out):
        raise UserError(
            "--progress rich: standard output is no terminal that can redraw; use --progress plain"
        )


def printable(text: str) -> str:
    """Return text with control characters, line ends and broken bytes written as escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def shorten(name: str, length: int) -> str:
    """Return a name that can be shown: without control characters, and at most so many long.

    The middle is left out, since names of one kind often share their beginning.
    """
    name = printable(name)
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[head + 1 - length :]}"


def clock(seconds: float) -> str:
    """Return a duration in s as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress(
    description: str, total: int | None = None, console: Console = err
) -> Iterator[Advance]:
    """Show the progress of something that takes a while.

    On a terminal this is a bar, redrawn four times a second, which stays when it is done. In a
    pipe it is one line at the end, preceded, where it takes long, by one after 10 s, 20 s, 40 s
    and so on.

    Args:
        description: What is done, in a word or two.
        total: How many items there are, or None where that is not known.
        console: Where to show it.

    Yields:
        `advance(n=1)`, to be called when n more items are done.
    """
    shown = _bar if is_live(console) else _lines
    with shown(printable(description), total, console) as advance:
        yield advance


@contextmanager
def _bar(description: str, total: int | None, console: Console) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn() if total is None else TimeRemainingColumn(elapsed_when_finished=True),
    )
    log_above_drawings()
    with Progress(*columns, console=console, refresh_per_second=4, expand=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(n: int = 1) -> None:
            bar.advance(task, n)

        yield advance
        done = bar.tasks[0].completed
        if total is None:
            bar.update(task, total=done)


@contextmanager
def _lines(description: str, total: int | None, console: Console) -> Iterator[Advance]:
    started = time.monotonic()
    next_line = _FIRST_LINE_AFTER
    done = 0
    of_total = "" if total is None else f"/{total}"

    def line() -> str:
        return f"{description}: {done}{of_total} in {time.monotonic() - started:.1f} s"

    def advance(n: int = 1) -> None:
        nonlocal done, next_line
        done += n
        if time.monotonic() - started >= next_line:
            next_line *= 2
            console.print(line())

    yield advance
    console.print(line())
