"""What a promise is measured by."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    """A row of the table: what is promised, what was found, and whether that is enough."""

    promise: str
    found: str
    holds: bool


Measure = Callable[[Path], Iterable[Figure]]
"""Measures in an empty folder of its own; what it raises counts as a promise that does not hold."""
