"""`sanctl dataset pack`: the images of each split become one file."""

from pathlib import Path
from typing import Annotated

import typer

from sanctl.cli.arguments import AllowOutside, IndexPath, Workers


def pack(
    path: IndexPath = None,
    short_side: Annotated[
        int, typer.Option(min=1, help="Shrink larger images until the short side has these px.")
    ] = 256,
    workers: Workers = None,
    allow_outside: AllowOutside = False,
) -> None:
    """Pack the images of each split into one file that training maps into memory.

    train_init.pt gives train_imgs.pt, and so on. Images that are small enough keep their bytes;
    larger ones are shrunk and encoded again, JPEG as JPEG, others as PNG, gray as gray.
    """
    from sanctl.data.index import load_index
    from sanctl.data.inside import require_inside
    from sanctl.data.pack import pack_index
    from sanctl.report.console import out, printable, progress

    for source in _indexes(path):
        target = source.with_name(source.name.replace("_init.pt", "_imgs.pt"))
        index = load_index(source)
        if not allow_outside:
            require_inside(index, source, "--allow-outside")
        with progress(f"pack {source}", total=len(index)) as advance:
            result = pack_index(index, index.root, target, short_side, workers, advance)
        out.print(
            f"{result.images} images, {result.shrunk} of them shrunk, "
            f"{result.bytes / 1e6:.1f} MB; wrote {printable(str(target))}"
        )
    out.print(f"next: {_next(target.parent)}")


def _indexes(path: Path | None) -> list[Path]:
    """Return the index files to pack."""
    from sanctl.data.locate import SPLIT_INDEXES, find_dataset
    from sanctl.errors import UserError

    if path is not None and path.is_file():
        if not path.name.endswith("_init.pt"):
            raise UserError(f"{path}: the name of an index to pack ends in _init.pt")
        return [path]
    folder = find_dataset(path, SPLIT_INDEXES)
    return [folder / name for name in SPLIT_INDEXES if (folder / name).is_file()]


def _next(folder: Path) -> str:
    """Return the command that makes a configuration for a packed dataset."""
    import shlex

    from sanctl.config.presets import dataset_names, preset_data_root
    from sanctl.data.locate import DATASETS

    place = folder.resolve()
    for name in dataset_names():
        if Path(preset_data_root(name)).resolve() == place:
            return f"sanctl config new {name} MODEL (sanctl config list names the models)"
    where = ""
    if place != (DATASETS / place.name).resolve():
        where = f" --data-root {shlex.quote(str(folder))}"
    return (
        f"sanctl config new {shlex.quote(place.name)} MODEL{where} "
        "(sanctl config list names the models)"
    )
