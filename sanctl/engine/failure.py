"""The first failure of a run with several processes, left where all of them find it."""

import json
import time
import traceback
from dataclasses import asdict, dataclass

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from sanctl.engine.team import Team
from sanctl.errors import SanctlError

_KEY = "failure"
_PATIENCE = 6.0  # seconds in which whoever caused a lost connection is found out


class ProcessFailedError(SanctlError):
    """A process of the run failed; the message says which, and on what."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Failure:
    """Why a run ended.

    Attributes:
        message: what the user is told: a line, and a traceback after it where that helps.
        exit_status: of the command.
    """

    message: str
    exit_status: int = 1

    @classmethod
    def of(cls, error: BaseException, team: Team) -> "Failure":
        """The failure of this process: a line for what is foreseen, a traceback for all else."""
        if isinstance(error, SanctlError):
            return cls(str(error), error.exit_status)
        first = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
        trace = "".join(traceback.format_exception(error)).rstrip()
        return cls(f"process {team.rank} on {team.host} failed: {first}\n{trace}")

    def error(self) -> ProcessFailedError:
        """What to raise for it."""
        return ProcessFailedError(self.message, self.exit_status)


def post(store: Store, failure: Failure) -> bool:
    """Leave a failure in the store; returns whether it is the first."""
    text = json.dumps(asdict(failure))
    return bytes(store.compare_set(_KEY, "", text)).decode() == text


def posted(store: Store) -> Failure | None:
    """The first failure that was left in the store."""
    return Failure(**json.loads(store.get(_KEY))) if store.check([_KEY]) else None


def post_own(store: Store, error: BaseException, team: Team) -> bool:
    """Leave the failure of this process in the store; returns whether it is the first.

    A process that has only lost its connection gives others time to say why before.
    """
    deadline = time.monotonic() + (_PATIENCE if _is_lost_connection(error) else 0)
    try:
        while time.monotonic() < deadline and posted(store) is None:
            time.sleep(0.1)
        return post(store, Failure.of(error, team))
    except DistError:  # whoever kept the store is gone
        return team.first


def _is_lost_connection(error: BaseException) -> bool:
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()
