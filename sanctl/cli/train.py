"""`sanctl train`: train a network, then test its best checkpoint."""

import os
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from sanctl.cli.arguments import Device, Overrides
from sanctl.cli.processes import Gpus, MaxRestarts, Nnodes, NodeRank, Nproc, RdzvEndpoint, words
from sanctl.cli.signals import told_what_is_saved
from sanctl.report.style import ProgressStyle

if TYPE_CHECKING:
    from sanctl.engine.membership import Membership
    from sanctl.engine.training import Job


def train(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Dataset: the folder of the config file.")
    ],
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Network: config/DATASET/DATASET_NAME.yaml, or a preset."
        ),
    ],
    override: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH", help="Go on from the run's newest checkpoint, or from this one."
        ),
    ] = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")
    ] = False,
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Test the best checkpoint at the end.")
    ] = True,
    gpus: Gpus = None,
    nproc: Nproc = None,
    nnodes: Nnodes = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: RdzvEndpoint = None,
    max_restarts: MaxRestarts = 0,
    progress: Annotated[
        ProgressStyle,
        typer.Option(help="A screen, key=value lines, or the end alone; auto: what suits stdout."),
    ] = ProgressStyle.AUTO,
) -> None:
    """Train a network, then test its best checkpoint.

    Ctrl-C saves at the next step and says how to go on; a second one stops at once. SIGTERM and
    SIGUSR1 save too.

    Every GPU of TRAIN.train_gpu trains, one process each, with a share of every batch. Under
    torchrun or srun, the processes that those have started train together.
    """
    from sanctl.config.load import resolve_config
    from sanctl.report.console import require_live

    overrides = override or []
    if progress is ProgressStyle.RICH:
        require_live()
    # Before the import of torch, which takes seconds: a typing error is told at once.
    loaded = resolve_config(dataset, name, overrides)
    with told_what_is_saved(loaded.run_dir):
        from sanctl.engine.membership import Membership
        from sanctl.engine.placement import LaunchOptions, place_processes
        from sanctl.engine.training import Job

        options = LaunchOptions(device, gpus, nproc, nnodes, node_rank, rdzv_endpoint, max_restarts)
        command = _command_to_go_on(dataset, name, overrides, words(options))
        member = Membership.found(os.environ, options.launches)
        placement = None if member else place_processes(loaded.config, options)
        job = Job(loaded, options, resume, command, placement, progress)
        if dry_run:
            _print_plan(job, member)
            return
        used = _train_job(job, member)
        if used is not None:
            _finish(job, used, test, quiet=progress is ProgressStyle.NONE)


def _train_job(job: "Job", member: "Membership | None") -> str | None:
    """Train; returns the device to test on, or None where another process does that."""
    from sanctl.engine.launch import launch
    from sanctl.engine.training import (
        device_under,
        interrupted_at_once,
        train_alone,
        train_as_launched,
        train_as_member,
    )
    from sanctl.report.console import out

    if member is not None:
        device = device_under(job, member)
        if member.size == 1:
            train_alone(job, device)
        else:
            train_as_member(job, member, device)
        return device if member.rank == 0 else None
    placement, restarts = job.placement, job.options.max_restarts
    assert placement is not None
    if placement.processes == 1 and not restarts:
        train_alone(job, placement.devices[0])
    else:
        try:
            launch(placement, train_as_launched, job, max_restarts=restarts, timeout=job.timeout)
        except KeyboardInterrupt as error:
            raise interrupted_at_once(job) from error
        finally:
            out.show_cursor()  # which a process that was killed may have hidden
    return placement.devices[0] if placement.node == 0 else None


def _command_to_go_on(dataset: str, name: str, overrides: list[str], options: list[str]) -> str:
    settings = [word for override in overrides for word in ("-o", override)]
    return shlex.join(["sanctl", "train", dataset, name, *settings, *options, "--resume", "auto"])


def _print_plan(job: "Job", member: "Membership | None") -> None:
    from sanctl.engine.run import open_run
    from sanctl.engine.team import Team
    from sanctl.engine.training import device_under
    from sanctl.report.console import out
    from sanctl.report.tables import print_table

    placement = job.placement
    if member is not None:
        if member.rank:
            return
        device, team = device_under(job, member), Team(0, member.size, member.local_size)
    else:
        assert placement is not None
        device = placement.devices[0]
        team = Team(0, placement.processes, len(placement.devices))
    run = open_run(job.loaded, device=device, resume=job.resume, team=team)
    info = run.info()
    rows = [(key.replace("_", " "), str(getattr(info, key))) for key in info.__slots__]
    print_table(["what", "value"], rows, title="A dry run: this would be trained")
    for note in (*run.notes, *(placement.notes if placement else ())):
        out.print(f"note: {note}")


def _finish(job: "Job", device: str, test: bool, quiet: bool) -> None:
    """Draw the curves and test the best checkpoint."""
    from sanctl.cli.test import test_and_print
    from sanctl.engine.device import choose_device
    from sanctl.engine.runfolder import RunFolder
    from sanctl.report.plots import plot_curves

    folder = RunFolder(job.loaded.run_dir)
    plot_curves(folder.metrics, folder.plots)
    if test:
        best = folder.best
        path = best if best.exists() else folder.checkpoints()[-1]  # no best without evaluation
        test_and_print(job.loaded.config, path, folder.test, choose_device(device, []), quiet=quiet)
