"""`sanctl slurm`: train on the machines of a SLURM cluster."""

from typing import Annotated

import typer

from sanctl.cli.arguments import Overrides


def slurm(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Dataset, as for `sanctl train`.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Network, as for `sanctl train`.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(min=1, help="GPUs of each machine; one process for each.")
    ] = 1,
    cpus_per_task: Annotated[
        int, typer.Option(min=1, help="Cores for each process and its data workers.")
    ] = 8,
    time: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="Time limit, as 24:00:00 or 2-12:00.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Default: the cluster's own.")] = None,
    override: Overrides = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the job with sbatch.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an edited script.")] = False,
) -> None:
    """Write a script for sbatch that trains on many GPUs, and submit it if asked to.

    Two minutes before the time limit the job saves and goes back into the queue, until it is done.
    """
    from sanctl.config.load import resolve_config

    overrides = override or []
    resolve_config(dataset, name, overrides)  # a mistake is told now, not after a night in a queue

    from sanctl.engine.slurm import Job, write_script
    from sanctl.engine.slurm import submit as submit_script
    from sanctl.report.console import out

    job = Job(dataset, name, overrides, nodes, gpus_per_node, cpus_per_task, time, partition)
    write_script(job, force)
    out.print(f"wrote {job.path}")
    if submit:
        out.print(submit_script(job.path))
    else:
        out.print(f"next: sbatch {job.path}")
