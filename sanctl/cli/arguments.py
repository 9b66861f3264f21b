"""Arguments and options that several commands share, so that they read alike everywhere."""

from pathlib import Path
from typing import Annotated

import typer

IndexPath = Annotated[
    Path | None,
    typer.Argument(
        metavar="PATH",
        help="Dataset folder or index file; default: the current folder, or the only dataset in "
        "dataset/.",
    ),
]
ImagesPath = Annotated[
    Path | None,
    typer.Argument(
        metavar="PATH",
        help="Dataset folder, index, pack or folder of class folders; default: the current "
        "folder, or the only dataset in dataset/.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes; default: one per core, 0: this one alone.")
]
AllowOutside = Annotated[
    bool,
    typer.Option(
        "--allow-outside", help="Read images outside the index's folder; only if you trust it."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", "-o", metavar="KEY=VALUE", help="Set a key, as TRAIN.epochs=3; repeatable."
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda|cuda:N", help="Default: a GPU if there is one.")
]
