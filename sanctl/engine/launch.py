"""Starts the processes of a run on this machine, through torch.distributed's elastic agent."""

import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from types import FrameType
from typing import Any, TypeVar

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sanctl.engine.failure import Failure, post, posted
from sanctl.engine.guard import Guard, current_attempt, local_pids, send
from sanctl.engine.interrupt import STOPPING, InterruptedRunError, StoppingSignals
from sanctl.engine.membership import LAUNCHED
from sanctl.engine.placement import Placement
from sanctl.engine.store import LEFT, MACHINES, STOP, attempt_store, connect
from sanctl.errors import SanctlError

Job = TypeVar("Job")
Result = TypeVar("Result")

_ARRIVAL = timedelta(minutes=15)  # in which all machines have to come
_SHORTLY = timedelta(seconds=5)  # in which a machine that has come answers
_FAREWELL = 10.0  # seconds for which machine 0 waits for the others to read why the run failed
_MAKES_NOISE = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
# What every process imports: once in the server from which they are forked.
_PRELOADED = ["sanctl.engine.fit", "sanctl.report.create"]


def launch(
    placement: Placement,
    work: Callable[[Job], Result],
    job: Job,
    *,
    max_restarts: int,
    timeout: timedelta,
) -> Result:
    """Run a function in a process for each device of this machine, and wait for them.

    Args:
        placement: the processes.
        work: what each does; an importable function, which finds its place in the environment.
        job: its argument; sent to the processes.
        max_restarts: how often all are started again when one fails.
        timeout: after which a process that does not answer is taken for lost.

    Returns:
        What the first process of this machine returned.

    Raises:
        SanctlError: a process failed; the message is that of the first.
        InterruptedRunError: a signal asked to stop, and the processes did.
        KeyboardInterrupt: Ctrl-C was pressed for a second time; the processes are gone.
    """
    per_machine = len(placement.devices)
    ranks = range(placement.node * per_machine, (placement.node + 1) * per_machine)
    store = _meet(placement)
    port = store.port  # type: ignore[attr-defined]

    def client() -> Store:  # one for each thread, so that none waits for another
        return connect(placement.host, port, False, timeout)

    with (
        tempfile.TemporaryDirectory(prefix="sanctl-") as folder,
        _quiet(),
        _Stopping(client(), ranks) as stopping,
        Guard(client(), ranks, placement.processes, timeout),
    ):
        _start_server()
        agent = elastic_launch(_agent_config(placement, port, max_restarts, folder), _run_rank)
        try:
            result = agent(work, job, multiprocessing.get_start_method())[ranks[0]]
        except ChildFailedError as error:
            raise _explained(store, error, stopping.asked) from None
        except SignalException as error:
            raise InterruptedRunError(f"ended by {error.sigval.name}", error.sigval) from None
        finally:
            if not stopping.at_once:
                _part(store, placement)
    if isinstance(result, _Interruption):
        raise InterruptedRunError(result.message, stopping.asked or result.number)
    return result


@dataclass(frozen=True)
class _Interruption:
    """How a process ends that has stopped as it was asked: no failure to the agent."""

    message: str
    number: int


def _run_rank(work: Callable[[Job], Result], job: Job, start_method: str) -> Result | _Interruption:
    """What the agent runs in each process, whose own data workers start as without an agent."""
    multiprocessing.set_start_method(start_method, force=True)
    try:
        result: Result | _Interruption = work(job)
    except InterruptedRunError as error:
        result = _Interruption(str(error), error.number)
    launcher = multiprocessing.parent_process()
    if launcher is not None and not launcher.is_alive():
        os._exit(1)  # torch would wait for it to read the result
    return result


def _meet(placement: Placement) -> Store:
    """Connect the machines; returns the store of the run, which machine 0 keeps.

    The waiting is done in short pieces, so that Ctrl-C ends it.
    """
    deadline = time.monotonic() + _ARRIVAL.total_seconds()
    host, port = placement.host, placement.port
    while placement.node and not _answers(host, port) and time.monotonic() < deadline:
        time.sleep(0.1)
    store = connect(host, port, placement.node == 0, _ARRIVAL if placement.node == 0 else _SHORTLY)
    store.set_timeout(_ARRIVAL)
    store.add(MACHINES, 1)
    while (arrived := store.add(MACHINES, 0)) < placement.nodes:
        if time.monotonic() > deadline:
            raise SanctlError(
                f"{host}:{port}: {arrived} of {placement.nodes} machines came within "
                f"{_ARRIVAL.total_seconds() / 60:.0f} minutes; start sanctl on each of them"
            )
        time.sleep(0.1)
    if arrived > placement.nodes:
        raise SanctlError(
            f"{host}:{port}: more than {placement.nodes} machines came; give each another "
            "--node-rank, and each run another port"
        )
    return store


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_SHORTLY.total_seconds()).close()
    except OSError:
        return False
    return True


def _part(store: Store, placement: Placement) -> None:
    """Let machine 0, which keeps the store, leave last."""
    deadline = time.monotonic() + _FAREWELL
    try:
        left = store.add(LEFT, 1)
        while placement.node == 0 and left < placement.nodes and time.monotonic() < deadline:
            time.sleep(0.1)
            left = store.add(LEFT, 0)
    except DistError:  # it did not
        return


def _agent_config(placement: Placement, port: int, max_restarts: int, folder: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        nproc_per_node=len(placement.devices),
        run_id="agent",
        rdzv_backend="static",
        rdzv_endpoint=f"{placement.host}:{port}",
        rdzv_configs={"rank": placement.node, "timeout": int(_ARRIVAL.total_seconds())},
        max_restarts=max_restarts,
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are those of `_Stopping`
    )


def _start_server() -> None:
    """Start the server from which the processes are forked, before anything here uses a GPU.

    It has imported what they need, and passes on that they are deaf to signals until they listen.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    os.environ[LAUNCHED] = "1"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ[LAUNCHED]
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopping(StoppingSignals):
    """A context in which signals to this process ask its processes to stop.

    Args:
        store: of the run; for this object alone.
        ranks: the processes of this machine.

    Attributes:
        asked: the first signal, or 0.
        at_once: whether the processes were killed after a second Ctrl-C.
    """

    def __init__(self, store: Store, ranks: Sequence[int]) -> None:
        self.asked = 0
        self.at_once = False
        self._store = store
        self._ranks = ranks

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            self.at_once = True
            self._send_all(signal.SIGKILL)
            raise KeyboardInterrupt
        self.asked = self.asked or number
        self._store.set(STOP, "")
        self._send_all(signal.SIGTERM)

    def _send_all(self, number: signal.Signals) -> None:
        for pid in local_pids(self._store, self._ranks):
            send(pid, number)


def _explained(store: Store, error: ChildFailedError, asked: int) -> SanctlError:
    """What to tell of the failure that the agent has found.

    The process itself has said the most, if it could; and if several failed, the first of them.
    """
    notes = attempt_store(store, current_attempt(store))
    failure = posted(notes)
    if failure is None:
        rank, found = error.get_first_failure()
        if asked and found.exitcode < 0:
            return InterruptedRunError("interrupted before the first step; nothing is saved", asked)
        post(notes, Failure(f"process {rank} on {socket.gethostname()} {_end_of(found)}"))
        failure = posted(notes)
        assert failure is not None
    return failure.error()


def _end_of(found: ProcessFailure) -> str:
    if found.exitcode == -signal.SIGKILL:
        return "was killed by SIGKILL (did the machine run out of memory?)"
    if found.exitcode < 0:
        return f"was killed by {found.signal_name()}"
    message: Any = found.message
    if isinstance(message, dict):
        return f"failed: {message['message']}\n{message['extraInfo']['py_callstack'].rstrip()}"
    return f"ended with status {found.exitcode}, without a word"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's agent from telling in its own words what is told here."""
    silent = logging.NullHandler()
    loggers = [logging.getLogger(name) for name in _MAKES_NOISE]
    for logger in loggers:
        logger.addHandler(silent)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(silent)
            logger.propagate = True
