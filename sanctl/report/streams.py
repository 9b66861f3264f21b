"""How a process of the command line writes text to a terminal or a pipe."""

import io
import sys


def accept_any_name() -> None:
    """Let stdout and stderr show class names beyond their encoding, in escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
