"""SIGTERM and SIGUSR1 while a run is starting or ending, when no training hears them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def told_what_is_saved(run_dir: Path) -> Iterator[None]:
    """A context in which these signals end the process with a word on what is saved.

    At once: what is being imported or opened could take the exception of a handler for its own.

    Args:
        run_dir: the run's folder.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if any((run_dir / "model").glob("*.pth")):
            text = f"interrupted outside of training; the last checkpoint in {run_dir} stands"
        else:
            text = "interrupted before the first step; nothing is saved yet"
        os.write(2, f"{text}; go on with --resume auto\n".encode(errors="replace"))
        os._exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
