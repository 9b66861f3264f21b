"""Ctrl-C during training: the first asks to stop at the next step, the second stops at once."""

import signal
from types import FrameType, TracebackType

from sanctl.errors import SanctlError


class InterruptedRunError(SanctlError):
    """Training stopped after Ctrl-C; the message says where, and what is saved.

    No KeyboardInterrupt: command-line parsers catch that and drop its message.
    """

    exit_status = 130  # what a shell reports for a process ended by Ctrl-C


class StopRequest:
    """A context in which the first Ctrl-C only sets `pending`.

    A step that is cut in the middle leaves weights and optimiser out of step with each other; a
    step boundary is a state that can be saved and resumed.
    """

    def __init__(self) -> None:
        self.pending = False

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True
