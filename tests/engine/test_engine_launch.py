"""Processes that are started together end together, and say why."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from sanctl.engine.board import RankBoard
from sanctl.engine.failure import ProcessFailedError
from sanctl.engine.guard import is_alive
from sanctl.engine.interrupt import InterruptedRunError, StopRequest
from sanctl.engine.launch import launch
from sanctl.engine.membership import Membership, joined
from sanctl.engine.placement import Placement
from sanctl.engine.team import Team
from sanctl.errors import UserError

HOST = Team().host


@dataclass(frozen=True)
class Job:
    """What the processes of a test do.

    Attributes:
        folder: where they leave their process ids.
        launcher: the process that has started them.
        act: called in every process after a few steps.
        timeout: of the run.
    """

    folder: Path
    launcher: int
    act: Callable[["Job", Team], None]
    timeout: timedelta


def work(job: Job) -> str:
    """Vote, as a run does after every step, until the processes are to stop."""
    member = Membership.found(os.environ)
    assert member is not None
    with joined(member, "gloo", job.timeout) as (team, stop):
        (job.folder / f"{team.rank}_{member.attempt}").write_text(str(os.getpid()))
        with RankBoard(team, torch.device("cpu")):
            return steps(job, team, stop, member.attempt)


def steps(job: Job, team: Team, stop: StopRequest, attempt: int) -> str:
    for step in range(6000):
        if step == 3:
            job.act(job, team)
        if attempt == 1 and step == 5:
            return f"process {team.rank} in attempt 1"
        if stop.agree():
            raise InterruptedRunError("stopped", stop.agreed)
        time.sleep(0.01)
    return "never stopped"


def raise_in_1(job: Job, team: Team) -> None:
    if team.rank == 1:
        raise ValueError("boom")


def mistake_in_1(job: Job, team: Team) -> None:
    if team.rank == 1:
        raise UserError("x.png: damaged")


def kill_1(job: Job, team: Team) -> None:
    if team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_1_at_first(job: Job, team: Team) -> None:
    if not (job.folder / "1_1").exists():
        kill_1(job, team)


def exit_1(job: Job, team: Team) -> None:
    if team.rank == 1:
        os._exit(3)


def stop_1(job: Job, team: Team) -> None:
    time.sleep(2.5)  # until every process has left a record
    if team.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_all_by(number: int) -> Callable[[Job, Team], None]:
    return {
        signal.SIGINT: _interrupt,
        signal.SIGTERM: _terminate,
        signal.SIGUSR1: _use,
    }[signal.Signals(number)]


def _interrupt(job: Job, team: Team) -> None:
    if team.first:
        os.kill(job.launcher, signal.SIGINT)


def _terminate(job: Job, team: Team) -> None:
    if team.first:
        os.kill(job.launcher, signal.SIGTERM)


def _use(job: Job, team: Team) -> None:
    if team.first:
        os.kill(job.launcher, signal.SIGUSR1)


def interrupt_twice(job: Job, team: Team) -> None:
    """Never get to the vote that would stop in good order."""
    _interrupt(job, team)
    if team.first:
        time.sleep(0.5)
    _interrupt(job, team)
    time.sleep(100)


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signal.Signals}
    yield
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        assert signal.getsignal(number) is before[number]
    for number in (signal.SIGHUP, signal.SIGQUIT):  # torch's agent leaves its own
        signal.signal(number, before[number])


def run(
    folder: Path, act: Callable[[Job, Team], None], restarts: int = 0, seconds: float = 60
) -> str:
    job = Job(folder, os.getpid(), act, timedelta(seconds=seconds))
    placement = Placement(("cpu", "cpu"))
    started = time.monotonic()
    try:
        return launch(placement, work, job, max_restarts=restarts, timeout=job.timeout)
    finally:
        pids = [int(path.read_text()) for path in folder.iterdir()]
        assert len(pids) >= 2
        while any(is_alive(pid) for pid in pids) and time.monotonic() < started + 90:
            time.sleep(0.05)  # those who are killed take a moment
        assert not [pid for pid in pids if is_alive(pid)]


def failure(folder: Path, act: Callable[[Job, Team], None], seconds: float = 60) -> str:
    with pytest.raises(ProcessFailedError) as caught:
        run(folder, act, seconds=seconds)
    assert caught.value.exit_status == 1
    return str(caught.value)


def test_the_first_traceback_is_shown_alone_and_whole(tmp_path: Path) -> None:
    lines = failure(tmp_path, raise_in_1).splitlines()
    assert lines[:2] == [
        f"process 1 on {HOST} failed: ValueError: boom",
        "Traceback (most recent call last):",
    ]
    assert lines[-1] == "ValueError: boom"
    assert any("in raise_in_1" in line for line in lines)
    assert sum("Traceback" in line for line in lines) == 1


def test_a_users_mistake_in_one_process_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailedError, match=r"^x\.png: damaged$") as caught:
        run(tmp_path, mistake_in_1, restarts=1)  # which cannot mend it
    assert caught.value.exit_status == 2


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    message = failure(tmp_path, kill_1)
    assert message.startswith(f"process 1 on {HOST} was killed by SIGKILL")
    assert "\n" not in message


def test_a_process_that_leaves_without_a_word_is_named(tmp_path: Path) -> None:
    assert failure(tmp_path, exit_1) == f"process 1 on {HOST} ended with status 3, without a word"


def test_a_stopped_process_is_noticed(tmp_path: Path) -> None:
    message = failure(tmp_path, stop_1, seconds=8)
    assert message.startswith(f"process 1 on {HOST} has not answered for ")
    assert "Distributed.timeout_minutes" in message


def test_a_failed_run_is_started_again(tmp_path: Path) -> None:
    assert run(tmp_path, kill_1_at_first, restarts=1) == "process 0 in attempt 1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launching_process_stops_all(tmp_path: Path, number: int) -> None:
    with pytest.raises(InterruptedRunError, match=r"^stopped$") as caught:
        run(tmp_path, stop_all_by(number))
    assert caught.value.exit_status == 128 + number


def test_a_second_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupt_twice)
