"""This process's place among those that train together, and how it takes it."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import Store

from sanctl.engine.failure import Failure, post_own, posted
from sanctl.engine.interrupt import InterruptedRunError, StopRequest
from sanctl.engine.machine import cpu_cores
from sanctl.engine.store import ATTEMPT, STOP, attempt_store, connect, pid_key
from sanctl.engine.team import ProcessTeam, Team
from sanctl.errors import SanctlError, UserError

LAUNCHED = "SANCTL_LAUNCHED"  # set for processes that sanctl itself has started
_FIRST_PORT, _PORTS = 20_000, 40_000  # where the jobs of a cluster meet, by their numbers


@dataclass(frozen=True)
class Membership:
    """A place among processes that something has started together.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: its number on its machine.
        local_size: how many there are on its machine.
        host, port: where they meet.
        serves: whether this process keeps their store.
        attempt: how often they have been started again.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    serves: bool
    attempt: int = 0

    @classmethod
    def found(cls, environment: Mapping[str, str], launching: bool = False) -> "Membership | None":
        """The place that torchrun or srun gives this process; None where neither started it.

        Args:
            environment: variables.
            launching: whether this process is to start others itself, as a task of srun may.

        Raises:
            UserError: what they say is no place; or torchrun has started this process, which then
                cannot start others.
        """
        if "RANK" in environment and "WORLD_SIZE" in environment:
            if launching:
                raise UserError(
                    f"this is one of {environment['WORLD_SIZE']} processes already (RANK and "
                    "WORLD_SIZE are set, as by torchrun): leave the options for several processes "
                    "out, or start sanctl without torchrun"
                )
            return cls._of_torchrun(environment)
        # A batch script, which is no task of srun, has SLURM_PROCID too, but no step.
        in_step = {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys()
        return cls._of_srun(environment) if in_step and not launching else None

    @classmethod
    def _of_torchrun(cls, environment: Mapping[str, str]) -> "Membership":
        rank = _number(environment, "RANK")
        return cls(
            rank=rank,
            size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK", 0),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", 1),
            host=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environment, "MASTER_PORT", 29500),
            serves=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        )

    @classmethod
    def _of_srun(cls, environment: Mapping[str, str]) -> "Membership":
        rank, size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NTASKS")
        nodes = _number(environment, "SLURM_NNODES", 1)
        port = _FIRST_PORT + _number(environment, "SLURM_JOB_ID", 0) % _PORTS
        host = environment.get("MASTER_ADDR")
        return cls(
            rank=rank,
            size=size,
            local_rank=_number(environment, "SLURM_LOCALID", 0),
            local_size=_number(environment, "SLURM_NTASKS_PER_NODE", -(-size // nodes)),
            host=host or ("127.0.0.1" if nodes == 1 else _first_host(environment)),
            port=_number(environment, "MASTER_PORT", port),
            serves=rank == 0,
        )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"the environment variable {name} is no number: {text!r}")
    return int(text)


def _first_host(environment: Mapping[str, str]) -> str:
    """The machine of process 0, which SLURM names in a notation of its own (`node[03-07]`)."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"`scontrol show hostnames` does not name the first machine of {nodes!r}; set the "
            "environment variable MASTER_ADDR to it"
        ) from error


@contextmanager
def joined(
    membership: Membership, backend: str, timeout: timedelta
) -> Iterator[tuple[ProcessTeam, StopRequest]]:
    """Take this process's place, and leave it with the others.

    Args:
        membership: the place.
        backend: "nccl" or "gloo".
        timeout: after which a process that does not answer is an error.

    Yields:
        The team, and what hears of the signals that ask it to stop.

    Raises:
        SanctlError: this process failed, as the first of them.
        SystemExit: it failed, and what started it, or an earlier failure of another, says why.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpu_cores() // membership.local_size))
    base = connect(membership.host, membership.port, membership.serves, timeout)
    store = attempt_store(base, membership.attempt)
    store.set(pid_key(membership.rank), str(os.getpid()))
    place = Team(membership.rank, membership.size, membership.local_size)
    try:
        base.set(ATTEMPT, str(membership.attempt))
        _refuse_a_mistake_again(base, membership.attempt)
        team = ProcessTeam(place, store, backend, timeout)
        with StopRequest(team, LAUNCHED in os.environ) as stop:
            if base.check([STOP]):  # asked before this process could hear it
                stop.pending = signal.SIGTERM
            yield from _until_all_are_done(team, stop)
    except InterruptedRunError:
        raise
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to save
        _fail(store, error, place)


def _until_all_are_done(
    team: ProcessTeam, stop: StopRequest
) -> Iterator[tuple[ProcessTeam, StopRequest]]:
    try:
        yield team, stop
    except InterruptedRunError:
        team.leave()  # once rank 0 has saved
        raise
    team.leave()


def _refuse_a_mistake_again(base: Store, attempt: int) -> None:
    """Fail on what the attempt before failed on, where another attempt cannot mend it."""
    before = posted(attempt_store(base, attempt - 1)) if attempt else None
    if before is not None and before.exit_status == UserError.exit_status:
        raise before.error()


def _fail(store: Store, error: Exception, place: Team) -> None:
    """End this process, with a word where nobody else has it."""
    first = post_own(store, error, place)
    if LAUNCHED in os.environ or not first:
        raise SystemExit(1) from error
    if isinstance(error, SanctlError):
        raise error
    raise Failure.of(error, place).error() from error
