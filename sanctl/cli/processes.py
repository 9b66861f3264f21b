"""The options for several processes, and how they are repeated."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sanctl.engine.placement import LaunchOptions

PANEL = "Several processes"
"""Under which the help lists them."""

Gpus = Annotated[
    str | None,
    typer.Option(
        metavar="0,1,...",
        help="GPUs of this machine, a process each; default: TRAIN.train_gpu.",
        rich_help_panel=PANEL,
    ),
]
Nproc = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes on this machine: the first GPUs, or with --device cpu any number.",
        rich_help_panel=PANEL,
    ),
]
Nnodes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Machines; start the command on each. Default: Distributed.world_size.",
        rich_help_panel=PANEL,
    ),
]
NodeRank = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="This machine's number, from 0. Default: Distributed.rank.",
        rich_help_panel=PANEL,
    ),
]
RdzvEndpoint = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Where the machines meet: machine 0 and a free port of it. "
        "Default: Distributed.dist_url.",
        rich_help_panel=PANEL,
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0,
        help="How often to go on from the last checkpoint after a process has failed.",
        rich_help_panel=PANEL,
    ),
]


def words(options: "LaunchOptions") -> list[str]:
    """The options as they are typed, for the command that goes on."""
    named = {
        "--device": options.device,
        "--gpus": options.gpus,
        "--nproc": options.nproc,
        "--nnodes": options.nnodes,
        "--node-rank": options.node_rank,
        "--rdzv-endpoint": options.endpoint,
        "--max-restarts": options.max_restarts or None,
    }
    given = {name: value for name, value in named.items() if value is not None}
    return [word for name, value in given.items() for word in (name, str(value))]
