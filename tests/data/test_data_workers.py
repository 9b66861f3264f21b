import gc
import multiprocessing
import os
import signal
import subprocess
from multiprocessing.connection import wait
from typing import Any

import pytest
import torch

from sanctl.data.workers import Chunks, Workers
from sanctl.errors import SanctlError


def killed_at(number: int, *, result: Any = None) -> Any:
    """A function of a chunk that ends its process at one number, as a kernel out of memory does."""

    def work(chunk: list[int]) -> Any:
        if number in chunk:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(chunk) if result is None else result

    return work


def test_a_death_disturbs_nothing_but_the_wait_for_results() -> None:
    """Whoever uses a result may be saving a checkpoint: no error may come out of the blue."""
    results = iter(Workers(killed_at(4), Chunks(20, 1), count=2))
    next(results)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    assert wait([worker.sentinel for worker in workers], timeout=30)  # here its signal arrives
    with pytest.raises(SanctlError, match="a data worker died"):
        list(results)


class Unreadable:
    """A result whose way to the main process breaks, as when its sender dies at that moment."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        return _raise, (self._error,)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (EOFError(), "EOFError"),
    ],
)
def test_a_connection_that_breaks_is_a_worker_that_died(error: Exception, reason: str) -> None:
    workers = Workers(killed_at(-1, result=Unreadable(error)), Chunks(20, 1), count=2)
    with pytest.raises(SanctlError, match=rf"a data worker died \(.*{reason}\)"):
        list(workers)


@pytest.mark.parametrize("number", [0, 4])
def test_after_a_death_the_other_workers_go_at_once(number: int) -> None:
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(SanctlError, match="a data worker died"):
            list(Workers(killed_at(number), Chunks(20, 1), count=2))
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_an_error_of_the_function_keeps_its_kind() -> None:
    def fail(_: list[int]) -> None:
        raise ConnectionRefusedError("the file server is down")

    for count in (0, 2):
        with pytest.raises(ConnectionRefusedError, match="the file server is down"):
            list(Workers(fail, Chunks(4, 1), count=count))


def test_a_schedulers_signals_are_for_the_main_process() -> None:
    """They reach every process of a job, and the main one still needs its workers to save."""
    results = iter(Workers(killed_at(-1), Chunks(6, 1), count=2))
    next(results)
    workers = multiprocessing.active_children()
    for name in ("-TERM", "-USR1", "-INT"):
        subprocess.run(["kill", name, *[str(worker.pid) for worker in workers]], check=True)
    assert [int(chunk) for chunk in results] == [1, 2, 3, 4, 5]


def test_the_main_process_can_end_a_worker() -> None:
    results = iter(Workers(killed_at(-1), Chunks(6, 1), count=1))
    next(results)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(30)
    assert not worker.is_alive()
