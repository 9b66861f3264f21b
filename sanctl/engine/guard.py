"""What a launching process does about processes that die, fail or stop."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from sanctl.engine.board import read_record
from sanctl.engine.failure import Failure, post, posted
from sanctl.engine.store import ATTEMPT, attempt_store, done_key, pid_key, record_key

_INTERVAL = 0.5  # seconds between two looks
_GRACE = 3.0  # seconds that processes have to end by themselves once one has failed


class Guard:
    """A context in which the processes of this machine end soon after any of the run has failed.

    torch's agent asks the others to end and waits half a minute for them. They may be unable to
    hear it: stopped, or in a collective operation that will never be complete.

    Args:
        store: of the run; no other thread may wait in this client of it.
        ranks: the processes of this machine.
        size: how many there are on all machines.
        timeout: after which a process that has stopped leaving records is taken for lost.
    """

    def __init__(self, store: Store, ranks: Sequence[int], size: int, timeout: timedelta) -> None:
        self._store = store
        self._ranks = ranks
        self._size = size
        self._timeout = timeout.total_seconds()
        self._attempt = 0
        self._trouble: float | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._pids: list[int] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def __enter__(self) -> "Guard":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_INTERVAL):
            try:
                troubled = self._look()
            except DistError:  # the machine that keeps the store has left
                troubled = True
            now = time.monotonic()
            if not troubled:
                self._trouble = None
            elif self._trouble is None:
                self._trouble = now
            elif now - self._trouble > _GRACE:
                for pid in self._pids:
                    send(pid, signal.SIGKILL)

    def _look(self) -> bool:
        """Whether a process has failed, on this machine or another."""
        attempt = current_attempt(self._store)
        if attempt != self._attempt:
            self._attempt, self._seen = attempt, {}
        store = attempt_store(self._store, attempt)
        self._pids = local_pids(self._store, self._ranks)
        if self._ranks[0] == 0:
            self._look_for_silence(store)
        return posted(store) is not None or any(self._is_gone(store, rank) for rank in self._ranks)

    def _is_gone(self, store: Store, rank: int) -> bool:
        if not store.check([pid_key(rank)]) or store.check([done_key(rank)]):
            return False
        return not is_alive(int(store.get(pid_key(rank))))

    def _look_for_silence(self, store: Store) -> None:
        """Post a failure for a process that has left no record for long."""
        now = time.monotonic()
        for rank in range(self._size):
            if not store.check([record_key(rank)]) or store.check([done_key(rank)]):
                continue
            text = store.get(record_key(rank))
            if self._seen.get(rank, (b"", now))[0] != text:
                self._seen[rank] = (text, now)
            elif now - self._seen[rank][1] > self._timeout:
                host = read_record(text).host
                post(store, Failure(
                    f"process {rank} on {host} has not answered for "
                    f"{now - self._seen[rank][1]:.0f} s: it was stopped, or its machine is not to "
                    "be reached (Distributed.timeout_minutes sets the limit)"
                ))  # fmt: skip


def current_attempt(store: Store) -> int:
    """The number of the attempt that runs."""
    return int(store.get(ATTEMPT)) if store.check([ATTEMPT]) else 0


def local_pids(store: Store, ranks: Sequence[int]) -> list[int]:
    """The process ids of this machine's processes that have got so far as to tell them."""
    store = attempt_store(store, current_attempt(store))
    return [int(store.get(pid_key(rank))) for rank in ranks if store.check([pid_key(rank)])]


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
