"""Which dataset a command works on when it is not told, or told by name."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from sanctl.errors import UserError

WHOLE_INDEX = "data_init.pt"
SPLIT_INDEXES = ("train_init.pt", "val_init.pt", "test_init.pt")
PACKS = ("train_imgs.pt", "val_imgs.pt", "test_imgs.pt")
DATASETS = Path("dataset")
"""The folder of datasets, in the current folder."""


def find_dataset(
    path: Path | None = None,
    holding: Sequence[str] = (WHOLE_INDEX, *SPLIT_INDEXES, *PACKS),
) -> Path:
    """Return the folder of a dataset.

    Args:
        path: The folder, or the name of a folder in `dataset/`. None stands for the current
            folder where it is a dataset, else for the only one in `dataset/`.
        holding: A folder is a dataset when it holds any of these files.

    Raises:
        UserError: There is no dataset, or several in `dataset/`; or `path` is none.
    """
    if path is not None:
        return _named(path, holding)
    if _holds(Path(), holding):
        return Path()
    found = sorted(folder for folder in DATASETS.glob("*") if _holds(folder, holding))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"no {_either(holding)} in this folder or in a folder of {DATASETS}/; "
            f"give the path of a dataset{_mend(holding)}"
        )
    names = ", ".join(str(folder) for folder in found)
    raise UserError(f"several datasets: {names}; name the one that you mean")


def find_index(path: Path | None = None) -> Path:
    """Return an index file: `path` itself, or the data_init.pt of the dataset that it names.

    Raises:
        UserError: There is none.
    """
    if path is not None and path.is_file():
        return path
    if path is not None and path.suffix == ".pt":
        raise UserError(f"{path}: there is no such file")
    return find_dataset(path, (WHOLE_INDEX,)) / WHOLE_INDEX


def index_home(source: Path) -> Path:
    """Return the folder in which the index of a folder of class folders belongs.

    That is the folder above it, since a dataset's files lie beside its images, unless `source` is
    itself a dataset: a folder in `dataset/`.
    """
    above = source.absolute().parent
    return source if above.name == DATASETS.name else source.parent if source.name else above


def as_argument(folder: Path) -> str:
    """Return what to type after a command to make it work on a dataset, with a space before.

    It is empty where the command finds the dataset by itself.
    """
    try:
        if find_dataset().resolve() == folder.resolve():
            return ""
    except UserError:
        pass
    return f" {shlex.quote(str(folder))}"


def _named(path: Path, holding: Sequence[str]) -> Path:
    places = [place for place in (path, DATASETS / path) if place.exists()]
    for place in places:
        if _holds(place, holding):
            return place
    if not places:
        raise UserError(f"{path}: there is no such folder, here or in {DATASETS}/")
    if not places[0].is_dir():
        raise UserError(f"{path}: is a file, not the folder of a dataset")
    raise UserError(f"{places[0]}: holds no {_either(holding)}{_mend(holding)}")


def _holds(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _mend(holding: Sequence[str]) -> str:
    if WHOLE_INDEX in holding:
        return "; `sanctl dataset index SOURCE` makes data_init.pt out of class folders"
    if SPLIT_INDEXES[0] in holding:
        return "; `sanctl dataset split --ratio 0.8` makes them out of data_init.pt"
    return "; `sanctl dataset pack` makes them"
