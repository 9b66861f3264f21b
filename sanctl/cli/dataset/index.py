"""`sanctl dataset index`: class folders become an index file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sanctl.data.index import ImageIndex

_NAMED = 5


def index(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder of class folders.")],
    depth: Annotated[
        int,
        typer.Option(
            min=1, help="Levels below SOURCE at which the class folders lie; 2 names a class a/b."
        ),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="File or folder to write; default: data_init.pt beside SOURCE, or in SOURCE where "
            "that is a folder of dataset/.",
        ),
    ] = None,
) -> None:
    """Index the images in class folders: data_init.pt lists them with their classes.

    Classes are the sorted folder names; a class's images may lie in folders of their own. Where
    SOURCE holds the folders train and val (and test) and no other, each gets its own index.
    """
    from sanctl.data.locate import index_home
    from sanctl.data.scan import split_folders
    from sanctl.report.console import out as console

    parts = split_folders(source)
    if parts:
        _index_parts(source, parts, depth, out)
        return
    path = _file_of(out, index_home(source))
    index = _scan(source, depth)
    _write({path: index})
    console.print(next_step(path, index))


def _index_parts(source: Path, parts: list[str], depth: int, out: Path | None) -> None:
    """Index a dataset that is split into folders already."""
    import shlex

    from sanctl.data.index import require_same_classes
    from sanctl.data.locate import as_argument
    from sanctl.errors import UserError
    from sanctl.report.console import out as console

    if out is not None and out.suffix == ".pt":
        raise UserError(
            f"--out {out}: {source} holds the parts {', '.join(parts)}, an index for each; "
            "name a folder"
        )
    home = out or source
    indexes = {part: _scan(source / part, depth) for part in parts}
    require_same_classes(indexes)
    _write({home / f"{part}_init.pt": index for part, index in indexes.items()})
    if "val" in parts:
        flag = outside_flag(home, *indexes.values())
        console.print(f"next: sanctl dataset pack{as_argument(home)}{flag}")
        return
    train, whole = shlex.quote(str(source / "train")), shlex.quote(str(home / "data_init.pt"))
    console.print(
        "training needs a val part too; to take it from train:\n"
        f"next: sanctl dataset index {train} --out {whole}\n"
        f"then: sanctl dataset split --ratio 0.9 {whole}"
    )


def _scan(source: Path, depth: int) -> "ImageIndex":
    """Index one folder, and warn of what is no image."""
    from sanctl.data.index import index_folder
    from sanctl.data.sniff import find_non_images
    from sanctl.report.console import progress

    with progress(f"index {source}") as advance:
        found, ignored = index_folder(source, depth, advance)
    with progress("look at the files", total=len(found)) as advance:
        suspects = find_non_images(found, advance)
    _warn("left out {}, no images by name or kind", ignored)
    _warn("indexed {} whose content is no image", suspects)
    return found


def _write(indexes: "dict[Path, ImageIndex]") -> None:
    from sanctl.data.index import save_index
    from sanctl.report.console import out as console
    from sanctl.report.console import printable

    for path, index in indexes.items():
        save_index(index, path)
        console.print(f"{describe(index)}; wrote {printable(str(path))}")


def next_step(path: Path, index: "ImageIndex") -> str:
    """Return the line that says what to do with a new index."""
    from sanctl.data.locate import SPLIT_INDEXES, WHOLE_INDEX, as_argument

    if path.name in SPLIT_INDEXES:
        flag = outside_flag(path.parent, index)
        return f"next: sanctl dataset pack{as_argument(path.parent)}{flag}"
    target = as_argument(path.parent if path.name == WHOLE_INDEX else path)
    return f"next: sanctl dataset split --ratio 0.8{target}"


def outside_flag(folder: Path, *indexes: "ImageIndex") -> str:
    """Return the option that reading these indexes in `folder` needs, with a space before."""
    from sanctl.data.inside import first_outside

    is_inside = all(first_outside(index, folder) is None for index in indexes)
    return "" if is_inside else " --allow-outside"


def describe(index: "ImageIndex") -> str:
    """Return how many images and classes an index has, and how even the classes are."""
    least, most = index.counts.min(), index.counts.max()
    each = f"{least}" if least == most else f"{least} to {most}"
    return f"{len(index)} images of {len(index.classes)} classes, {each} per class"


def _warn(what: str, paths: list[Path]) -> None:
    from sanctl.report.console import err, printable

    if not paths:
        return
    count = "1 file" if len(paths) == 1 else f"{len(paths)} files"
    named = ", ".join(printable(str(path)) for path in paths[:_NAMED])
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    err.print(f"warning: {what.format(count)}: {named}{more}")


def _file_of(out: Path | None, home: Path) -> Path:
    from sanctl.data.locate import WHOLE_INDEX

    if out is None:
        return home / WHOLE_INDEX
    return out / WHOLE_INDEX if out.is_dir() or out.suffix != ".pt" else out
