"""`sanctl train` in one process: alone, or as one of several."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

from sanctl.config.load import LoadedConfig
from sanctl.engine.claim import claimed
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import InterruptedRunError, StopRequest
from sanctl.engine.membership import Membership, joined
from sanctl.engine.placement import (
    LaunchOptions,
    Placement,
    backend_of,
    member_device,
    require_images_for_all,
)
from sanctl.engine.run import Run, open_run
from sanctl.engine.team import Team
from sanctl.report.create import create_reporter
from sanctl.report.reporter import Reporter
from sanctl.report.streams import accept_any_name
from sanctl.report.style import ProgressStyle


@dataclass(frozen=True)
class Job:
    """A run as it was asked for.

    Attributes:
        loaded: the configuration.
        options: of the command line.
        resume: a checkpoint's path, "auto", or None for what TRAIN.resume says.
        command: with which the user goes on after an interruption.
        placement: what was made of the options; None under torchrun or srun.
        progress: how the run is shown.
    """

    loaded: LoadedConfig
    options: LaunchOptions
    resume: str | None
    command: str
    placement: Placement | None
    progress: ProgressStyle

    @property
    def timeout(self) -> timedelta:
        """After which a process that does not answer is taken for lost."""
        return timedelta(minutes=self.loaded.config.Distributed.timeout_minutes)


def train_alone(job: Job, device: str) -> Run:
    """Train in this process.

    Raises:
        SanctlError: as of `open_run` and `fit`.
        InterruptedRunError: the message says how to go on.
    """
    with claimed(job.loaded.run_dir) as notes:
        run = open_run(job.loaded, device=device, resume=job.resume)
        run.notes.extend(notes)
        return _train(job, run, stop=None)


def train_as_launched(job: Job) -> None:
    """Train as one of the processes that this program has started: what each of them does.

    Raises:
        InterruptedRunError: as `train_alone`.
        SystemExit: this process failed; the launching one says on what.
    """
    accept_any_name()
    member = Membership.found(os.environ)
    assert member is not None
    assert job.placement is not None
    train_as_member(job, member, job.placement.devices[member.local_rank])


def train_as_member(job: Job, member: Membership, device: str) -> Run:
    """Train as one of several processes.

    Raises:
        SanctlError, InterruptedRunError: as `train_alone`.
        SystemExit: this process failed, and another says on what.
    """
    config = job.loaded.config
    resume = "auto" if member.attempt else job.resume
    with (
        joined(member, backend_of(config, device), job.timeout) as (team, stop),
        _claimed_by_first(job, team) as notes,
    ):
        run = open_run(job.loaded, device=device, resume=resume, team=team)
        run.notes.extend(notes)
        if member.attempt:
            run.notes.insert(0, f"a process failed: started again, for the {member.attempt}. time")
        return _train(job, run, stop)


def device_under(job: Job, member: Membership) -> str:
    """The device of a process that torchrun or srun has started.

    Raises:
        UserError: there is none for it, or no image in a batch.
    """
    require_images_for_all(job.loaded.config, member.size)
    return member_device(job.loaded.config, job.options, member)


def _claimed_by_first(job: Job, team: Team) -> AbstractContextManager[list[str]]:
    """The run's folder is rank 0's, which alone writes there."""
    return claimed(job.loaded.run_dir) if team.first else nullcontext([])


def _train(job: Job, run: Run, stop: StopRequest | None) -> Run:
    if job.placement is not None:
        run.notes.extend(job.placement.notes)
    reporter = Reporter()
    if run.team.first:
        reporter = create_reporter(run.folder.root, run.config.TRAIN.print_freq, job.progress)
    try:
        fit(run, reporter, stop)
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error}; go on with: {job.command}", error.number) from error
    except KeyboardInterrupt as error:
        raise interrupted_at_once(job) from error
    finally:
        reporter.close()
    return run


def interrupted_at_once(job: Job) -> InterruptedRunError:
    """What to raise after a second Ctrl-C."""
    return InterruptedRunError(
        f"interrupted at once, without saving; go on from the last checkpoint with: {job.command}"
    )
