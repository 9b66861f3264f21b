"""What the operators log, as notes of a run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOGGER = "sanctl_ops"


class _NoteHandler(logging.Handler):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(record.getMessage())


@contextmanager
def log_as_notes(note: Callable[[str], None]) -> Iterator[None]:
    """Pass on what the operators log: why they fall back, and that kernels are being compiled.

    Args:
        note: Takes a sentence that the user should read. It may be called from another thread,
            since autograd runs backward passes on GPUs in threads of its own.
    """
    logger, handler = logging.getLogger(LOGGER), _NoteHandler(note)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
