"""`sanctl dataset sample`: a smaller dataset out of a larger one."""

from pathlib import Path
from typing import Annotated

import typer

from sanctl.cli.arguments import IndexPath


def sample(
    path: IndexPath = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The index to write, as dataset/mini/data_init.pt."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Images to keep of each class.")] = None,
    frac: Annotated[
        float | None, typer.Option(help="Share to keep of each class, at least one image.")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(metavar="K", help="Classes to keep, drawn at random.")
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(metavar="OTHER.pt", help="Leave out the images that this index lists."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws classes and images.")] = 0,
) -> None:
    """Take some classes, some images of each class, or what another index does not list.

    The options combine: --classes 300 --n 1000 keeps 1000 images of each of 300 classes. The
    classes of the new index are numbered from 0; the images stay where they are.
    """
    from sanctl.cli.dataset.index import describe, next_step
    from sanctl.data.index import load_index, save_index
    from sanctl.data.locate import WHOLE_INDEX, find_index
    from sanctl.data.sample import sample_index, without
    from sanctl.errors import UserError
    from sanctl.report.console import out as console
    from sanctl.report.console import printable

    if out is None:
        raise UserError("where to? name a file: --out dataset/mini/data_init.pt")
    if n is None and frac is None and classes is None and exclude is None:
        raise UserError("what to keep? give --n, --frac, --classes or --exclude")
    index = load_index(find_index(path))
    if exclude is not None:
        rest = without(index, load_index(exclude))
        console.print(f"left out {len(index) - len(rest)} images that {exclude} lists")
        index = rest
    part = sample_index(index, seed=seed, classes=classes, n=n, frac=frac)
    if out.suffix != ".pt":
        out = out / WHOLE_INDEX
    save_index(part, out)
    console.print(f"{describe(part)}; wrote {printable(str(out))}")
    console.print(next_step(out, part))
