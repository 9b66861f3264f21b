"""Requests to stop training: Ctrl-C, and the signals of schedulers.

The first asks to stop at the next step; a second Ctrl-C stops at once.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

from sanctl.engine.team import Team
from sanctl.errors import SanctlError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class InterruptedRunError(SanctlError):
    """Training stopped because a signal asked for it; the message says where, and what is saved.

    No KeyboardInterrupt: command-line parsers catch that and drop its message.

    Args:
        message: what the user is told.
        number: the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number
        self.exit_status = 128 + number  # what a shell reports for a process ended by the signal


class StoppingSignals:
    """A context in which the signals that ask to stop come to `_on_signal`."""

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopRequest(StoppingSignals):
    """A context in which the first signal only sets `pending`.

    A step that is cut in the middle leaves weights and optimiser out of step with each other; a
    step boundary is a state that can be saved and resumed.

    Args:
        team: the processes that have to stop together.
        launched: whether another process started this one, and passes on what it is asked.

    Attributes:
        pending: the signal that asked this process to stop, or 0.
        agreed: the signal for which all processes stop, or 0.
    """

    def __init__(self, team: Team, launched: bool = False) -> None:
        self.pending = 0
        self.agreed = 0
        self._team = team
        self._launched = launched

    def agree(self, at_once: bool = False) -> bool:
        """Find out whether all processes stop here; every one of them has to ask.

        Args:
            at_once: as that of `Team.agree`.
        """
        self.agreed = self._team.agree(self.pending, at_once)
        return self.agreed != 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._launched:
            return  # pressed at the terminal, where the launching process hears it too
        if self.pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = self.pending or number
