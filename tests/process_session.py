"""A process in a session of its own, as a terminal has one, so that signals reach all of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def python(
    *arguments: str, folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Start Python with these arguments; whatever happens, nothing of the session is left.

    Args:
        arguments: of the command line.
        folder: where it runs, if not here.
        variables: its environment, if not this one.
    """
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=variables,
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
