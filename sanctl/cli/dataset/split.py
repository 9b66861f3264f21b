"""`sanctl dataset split`: one index becomes two or three."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanctl.cli.arguments import IndexPath

if TYPE_CHECKING:
    from sanctl.data.index import ImageIndex


def split(
    path: IndexPath = None,
    ratio: Annotated[
        list[float],
        typer.Option(
            help="Share of train; give it again for the share of val, then the rest is test."
        ),
    ] = [],  # noqa: B006 - typer turns it into a list of its own
    seed: Annotated[int, typer.Option(min=0, help="Draws the images.")] = 0,
) -> None:
    """Split a dataset class by class: train_init.pt, val_init.pt and perhaps test_init.pt.

    The same seed and the same images give the same split. The parts lie beside the index.
    """
    from sanctl.cli.dataset.index import describe, outside_flag
    from sanctl.data.index import load_index
    from sanctl.data.locate import SPLIT_INDEXES, as_argument, find_index
    from sanctl.data.split import save_split, split_index
    from sanctl.errors import UserError
    from sanctl.report.console import out, printable

    if not ratio:
        raise UserError("how to split? --ratio 0.8 gives train 0.8 of every class and val the rest")
    source = find_index(path)
    if source.name in SPLIT_INDEXES:
        raise UserError(
            f"{source}: the split would overwrite it; copy it to data_init.pt and split that"
        )
    parts = split_index(load_index(source), ratio, seed)
    written = save_split(parts, source.parent)
    for file, part in zip(written, parts, strict=True):
        out.print(f"{describe(part)}; wrote {printable(str(file))}")
    _warn_of_leftovers(source.parent, parts)
    flag = outside_flag(source.parent, *parts)
    out.print(f"next: sanctl dataset pack{as_argument(source.parent)}{flag}")


def _warn_of_leftovers(folder: Path, parts: "list[ImageIndex]") -> None:
    """Name the test part of an earlier split, if it shares images with this one."""
    from sanctl.data.index import load_index
    from sanctl.data.locate import SPLIT_INDEXES
    from sanctl.report.console import err

    used = {key for part in parts for key in part.file_keys()}
    for path in (folder / name for name in SPLIT_INDEXES[len(parts) :]):
        shared = used.intersection(load_index(path).file_keys()) if path.is_file() else ()
        if shared:
            err.print(
                f"warning: {path} is of an earlier split and shares {len(shared)} images with this "
                "one; remove it, and its pack"
            )
