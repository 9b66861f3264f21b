"""`sanctl bench-models` on several GPUs: the processes that measure, and their table.

Benchmarks know nothing of the engine, which starts processes and joins them; the command brings the
two together.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sanctl.cli.bench_options import figure, note
from sanctl.cli.bench_plan import Outcome, Plan
from sanctl.errors import UserError
from sanctl.report.streams import accept_any_name

if TYPE_CHECKING:
    from sanctl.bench.scaling import ScalingRecord
    from sanctl.engine.placement import LaunchOptions, Placement
    from sanctl.engine.team import Team
    from sanctl.report.console import Advance

_TIMEOUT = timedelta(minutes=30)  # in which one process may compile while the others wait


@dataclass(frozen=True)
class Job:
    """What the processes are sent: what to measure, and where they are."""

    plan: Plan
    placement: "Placement"


def choose_processes(options: "LaunchOptions") -> "Placement":
    """Decide which processes measure.

    Raises:
        UserError: This machine does not have the devices, there is only one, or something else has
            started this process as one of several.
    """
    from sanctl.bench.backends import backend_set
    from sanctl.engine.membership import Membership
    from sanctl.engine.placement import Placement, local_devices

    Membership.found(os.environ, launching=True)  # refuses to start others under torchrun
    with backend_set("torch"):  # which runs anywhere
        devices, _ = local_devices(options, [0])
    if len(devices) == 1:
        given = f"--gpus {options.gpus}" if options.gpus is not None else f"--nproc {options.nproc}"
        raise UserError(
            f"{given}: one process has none to be compared with; ask for two or more, or measure "
            f"one alone with just --device {devices[0]}"
        )
    return Placement(tuple(devices), backend="gloo" if devices[0] == "cpu" else "nccl")


def measure_scaling(plan: Plan, placement: "Placement") -> Outcome:
    """Measure in a process for each device.

    Raises:
        SanctlError: A process failed.
        InterruptedRunError: A signal asked to stop.
    """
    from sanctl.engine.launch import launch
    from sanctl.report.console import err

    try:
        job = Job(plan, placement)
        records, device = launch(placement, measure, job, max_restarts=0, timeout=_TIMEOUT)
    finally:
        err.show_cursor()  # which a process that was killed may have hidden
    one, several = _names(placement)
    legend = (
        f"{one}, {several}: images/s of one and of all, {plan.settings.batch} images a step in "
        f"each\nscaling: {several} over {one}; +-%: half its range over the rounds\n"
        f"ratio: {several} over those of {plan.reference}; peak GiB: the most in one of them"
    )
    return Outcome(
        records=records,
        device=device,
        columns=("network", one, several, "scaling", "+-%", "ratio", "peak GiB"),
        rows=[_row(record) for record in records],
        where=f" on each of {several}",
        legend=legend,
    )


def measure(job: Job) -> "tuple[list[ScalingRecord], str]":
    """Measure as one of the processes: what each of them does.

    Returns:
        The records, which only the first process has, and the names of all devices.

    Raises:
        InterruptedRunError: A signal asked to stop.
        SystemExit: This process failed; the launching one says on what.
    """
    import torch

    from sanctl.bench.backends import backend_set
    from sanctl.bench.scaling import bench_scaling
    from sanctl.config.schema import TrainConfig
    from sanctl.engine.device import describe_device, prepare_backends
    from sanctl.engine.interrupt import InterruptedRunError
    from sanctl.engine.membership import Membership, joined

    accept_any_name()
    member = Membership.found(os.environ)
    assert member is not None
    plan, device = job.plan, torch.device(job.placement.devices[member.local_rank])
    with (
        joined(member, job.placement.backend, _TIMEOUT) as (team, stop),
        _shown_by_first(team, plan.turns) as show,
        backend_set(plan.backend),
    ):
        prepare_backends(TrainConfig(manual_seed=0), device)

        def advance() -> None:
            show()
            if stop.agree(at_once=True):
                raise InterruptedRunError("interrupted; nothing is written", stop.agreed)

        records = bench_scaling(
            plan.names, plan.reference, plan.settings, plan.rounds, device, team, advance
        )
        return records, " + ".join(team.gather(describe_device(device)))


@contextmanager
def _shown_by_first(team: "Team", turns: int) -> "Iterator[Advance]":
    from sanctl.report.console import progress
    from sanctl.report.lognotes import log_as_notes

    if not team.first:
        yield lambda n=1: None
        return
    with progress("rounds of networks", turns) as advance, log_as_notes(note):
        yield advance


def _names(placement: "Placement") -> tuple[str, str]:
    """Return what one process and all of them are called in the table."""
    if placement.devices[0] == "cpu":
        return "1 process", f"{placement.processes} processes"
    return "1 GPU", f"{placement.processes} GPUs"


def _row(record: "ScalingRecord") -> list[str | None]:
    scaling, rounds = record.scaling, record.scalings
    return [
        record.network,
        figure(record.alone_images_per_s),
        figure(record.images_per_s),
        None if scaling is None else f"{scaling:.3f}",
        None if scaling is None else f"{50 * (max(rounds) - min(rounds)) / scaling:.1f}",
        None if record.ratio is None else f"{record.ratio:.2f}",
        figure(record.peak, 1 / 2**30),
    ]
