"""The errors that a user sees as one line.

Every error that sanctl raises on purpose is one of these; the entry point prints its message
alone, without a traceback, and exits with its status. A message names the file, the key or the
value that is wrong, and the mend.
"""

import reprlib
from typing import Any

_SHOWN = 60

_reprs = reprlib.Repr()
_reprs.maxlevel = 3
_reprs.maxlist = _reprs.maxtuple = _reprs.maxdict = 12
_reprs.maxstring = _reprs.maxother = 2 * _SHOWN


class SanctlError(Exception):
    """Something failed that the user did not get wrong: a full disk, a loss that is not finite."""

    exit_status = 1


class UserError(SanctlError):
    """The user's input is wrong: a missing folder, an unknown key, an unreadable file."""

    exit_status = 2


def shown(value: Any) -> str:
    """Return a value out of a file as short printable text, however large or nested it is."""
    try:
        text = _reprs.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
