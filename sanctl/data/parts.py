"""The images that a command looks through: the parts of a dataset, however it is stored."""

from pathlib import Path

from sanctl.data.index import index_folder, load_index
from sanctl.data.inside import require_inside
from sanctl.data.locate import PACKS, SPLIT_INDEXES, WHOLE_INDEX, find_dataset
from sanctl.data.packed import open_packed
from sanctl.data.scan import split_folders
from sanctl.data.source import FileSource, ImageSource

_WHOLE = "all"
_INDEX_END, _PACK_END = "_init.pt", "_imgs.pt"


def open_parts(
    path: Path | None, depth: int = 1, allow_outside: bool = False
) -> dict[str, ImageSource]:
    """Open every part of a dataset.

    Args:
        path: An index, a pack, a folder that holds indexes (or else packs), a folder of class
            folders, or one that holds such folders as train/, val/ and test/. None stands for the
            dataset that `find_dataset` finds.
        depth: Levels below a plain folder at which the class folders lie.
        allow_outside: Whether an index may name images outside its folder.

    Returns:
        The images by the name of their part: "train", "val" and "test" where the dataset is
        split, else "all" alone.

    Raises:
        UserError: There is no such dataset, or it cannot be read.
    """
    if path is not None and path.is_file():
        return {_part_of(path): _open_file(path, allow_outside)}
    if path is None or not path.is_dir():
        path = find_dataset(path)
    for names in (SPLIT_INDEXES, (WHOLE_INDEX,), PACKS):
        files = [path / name for name in names if (path / name).is_file()]
        if files:
            return {_part_of(file): _open_file(file, allow_outside) for file in files}
    folders = {part: path / part for part in split_folders(path)} or {_WHOLE: path}
    return {part: FileSource(index_folder(folders[part], depth)[0]) for part in folders}


def _open_file(path: Path, allow_outside: bool) -> ImageSource:
    if path.name.endswith(_PACK_END):
        return open_packed(path)
    index = load_index(path)
    return FileSource(index if allow_outside else require_inside(index, path, "--allow-outside"))


def _part_of(path: Path) -> str:
    if path.name == WHOLE_INDEX:
        return _WHOLE
    return path.name.removesuffix(_PACK_END).removesuffix(_INDEX_END)
