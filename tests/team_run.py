"""Groups of real processes on this machine, which talk through gloo."""

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from sanctl.engine.membership import LAUNCHED, Membership, joined

TIMEOUT = timedelta(seconds=60)
Work = Callable[..., Any]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_team(size: int, work: Work, *arguments: Any) -> list[Any]:
    """Call `work(team, stop, *arguments)` in `size` processes; what each returns, in rank order.

    Args:
        size: how many processes.
        work: an importable function.
        arguments: sent to the processes.
    """
    context = multiprocessing.get_context("forkserver")  # imports once for all processes
    context.set_forkserver_preload(["sanctl.engine.fit", "sanctl.report.create"])
    port = free_port()
    pairs = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_process, args=(rank, size, port, pairs[rank][1], work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        answers: list[tuple[Any] | str] = [
            pair[0].recv() if pair[0].poll(100) else "no answer" for pair in pairs
        ]
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * size
    failures = [answer for answer in answers if isinstance(answer, str)]
    assert not failures, "\n".join(failures)
    return [answer[0] for answer in answers]


def _process(
    rank: int, size: int, port: int, answer: Connection, work: Work, arguments: tuple[Any, ...]
) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.environ.pop(LAUNCHED, None)  # where the server was started by a test of the launcher
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    member = Membership(rank, size, rank, size, "127.0.0.1", port, serves=rank == 0)
    try:
        with joined(member, "gloo", TIMEOUT) as (team, stop):
            answer.send((work(team, stop, *arguments),))
    except BaseException:
        answer.send(traceback.format_exc())
