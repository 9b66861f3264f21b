"""Whether self-attention runs as one operator or as the primitives, one after the other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

MODES = ("auto", "fused", "primitives")
VARIABLE = "SANCTL_ATTENTION"
DEFAULT = "auto"

_requested: str | None = None


def set_attention(mode: str) -> None:
    """Choose how self-attention runs from now on, in place of the variable SANCTL_ATTENTION.

    Args:
        mode: "auto", one operator where there are kernels for it and the primitives elsewhere;
            "fused", one operator anywhere; "primitives", never.

    Raises:
        ValueError: there is no such mode.
    """
    global _requested
    _requested = _known(mode, "attention")


@contextmanager
def use_attention(mode: str) -> Iterator[None]:
    """Choose as `set_attention` does for a block; afterwards the choice is what it was before.

    Raises:
        ValueError: there is no such mode.
    """
    global _requested
    before = _requested
    set_attention(mode)
    try:
        yield
    finally:
        _requested = before


def requested_attention() -> str:
    """Return the mode: from `set_attention`, else SANCTL_ATTENTION, else "auto".

    Raises:
        ValueError: the variable names no mode.
    """
    return _requested or _known(os.environ.get(VARIABLE) or DEFAULT, VARIABLE)


def _known(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode
