"""A process in a session of its own, as a terminal has one, so that signals reach all of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def python(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Start Python with these arguments; whatever happens, nothing of the session is left."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
