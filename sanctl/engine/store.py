"""The key-value store through which processes and machines find each other, and its keys."""

from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    TCPStore,
)
from torch.distributed.distributed_c10d import PrefixStore, Store

from sanctl.errors import SanctlError

# Of the whole run, attempt for attempt.
ATTEMPT = "sanctl/attempt"  # the number of the attempt that runs
STOP = "sanctl/stop"  # set once a launching process has been asked to stop
MACHINES = "sanctl/machines"  # how many launching processes have arrived
LEFT = "sanctl/left"  # how many of them have read why the run failed


def connect(host: str, port: int, serve: bool, timeout: timedelta) -> Store:
    """Connect to the store of a run.

    Args:
        host: the machine that keeps it.
        port: its port there; 0 to serve on any that is free.
        serve: whether this process keeps it.
        timeout: how long to wait for it, and for values in it.

    Raises:
        SanctlError: nobody answers there, or the port is taken.
    """
    try:
        return TCPStore(
            host, port, None, serve, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except DistError as error:
        if serve:
            raise SanctlError(
                f"cannot wait at {host}:{port} for the other processes: the port is taken, by "
                "another run or by a machine with the same --node-rank, or it is not this "
                "machine's; see --rdzv-endpoint"
            ) from error
        raise SanctlError(f"no answer from {host}:{port}, where the processes meet") from error


def attempt_store(store: Store, attempt: int) -> Store:
    """The part of the store in which the processes of one attempt leave their notes."""
    return PrefixStore(f"sanctl/{attempt}", store)


def pid_key(rank: int) -> str:
    """Where a process leaves its process id."""
    return f"pid/{rank}"


def done_key(rank: int) -> str:
    """What a process leaves when it has done all it had to."""
    return f"done/{rank}"


def record_key(rank: int) -> str:
    """Where a process leaves, again and again, what it did lately."""
    return f"record/{rank}"
