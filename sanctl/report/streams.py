"""How a process of the command line writes text to a terminal or a pipe."""

import io
import logging
import sys


def accept_any_name() -> None:
    """Let stdout and stderr show class names beyond their encoding, in escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Stderr:
    """What `sys.stderr` is at the time: while something is drawn, what prints above it."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def log_above_drawings() -> None:
    """Let logs of libraries, torch's above all, appear above what is drawn on the terminal.

    Their handlers took stderr as they were made, before it was replaced by what prints above the
    drawing, and would write across it.
    """
    for name in (None, *logging.Logger.manager.loggerDict):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
                handler.setStream(_Stderr())
