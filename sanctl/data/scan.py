"""The images in class folders, by the rules of torchvision's ImageFolder.

Classes are the sorted folder names, images the sorted files under each, however deep, that have a
known extension. Unlike ImageFolder it leaves out hidden files and folders (`.ipynb_checkpoints`,
`._photo.jpg`), follows no link into a folder that it is in already, and tells what it left out.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from sanctl.errors import UserError

Progress = Callable[[int], object]
"""Called with the number of items done since the last call."""

_OWN_FILES = ("_init.pt", "_imgs.pt")
_NAMED = 3


@dataclass
class _Walk:
    """What a walk through the folders collects."""

    source: Path
    progress: Progress | None
    ignored: list[Path] = field(default_factory=list)

    def ignore(self, relative: str) -> None:
        self.ignored.append(self.source / relative)


@dataclass(frozen=True)
class _Folder:
    """A folder below the source, and the (device, inode) of it and of those that it lies in."""

    relative: str
    chain: frozenset[tuple[int, int]]

    def inside(self, name: str) -> str:
        return f"{self.relative}/{name}" if self.relative else name


class Scan(NamedTuple):
    """What a folder holds: class names, (path, class index) of every image, and the rest."""

    classes: list[str]
    samples: list[tuple[str, int]]
    ignored: list[Path]


def scan_folder(source: Path, depth: int, progress: Progress | None) -> Scan:
    """List the classes and images of a folder; paths start from it, with forward slashes.

    Raises:
        UserError: The folder is missing or unreadable, has no class folders, or a class folder
            holds no image.
    """
    if not source.is_dir():
        what = "is a file, not a folder of class folders" if source.exists() else "does not exist"
        raise UserError(f"{source} {what}")
    walk = _Walk(source, progress)
    start = source.stat()
    level = [_Folder("", frozenset({(start.st_dev, start.st_ino)}))]
    for below in range(depth):
        level = [child for parent in level for child in _class_level(walk, parent, below, depth)]
    level.sort(key=lambda folder: folder.relative)
    samples: list[tuple[str, int]] = []
    empty = []
    for target, folder in enumerate(level):
        images = _images(walk, folder)
        samples += [(image, target) for image in images]
        if not images:
            empty.append(folder.relative)
    if empty:
        raise _no_images(source, empty, len(level))
    return Scan([folder.relative for folder in level], samples, walk.ignored)


def split_folders(source: Path) -> list[str]:
    """Return ["train", "val"], perhaps with "test", where those are the only folders in `source`.

    A dataset whose parts lie in train/ and test/ alone gives ["train", "test"]; any other
    folder gives an empty list.
    """
    try:
        with os.scandir(source) as entries:
            names = {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
    except OSError:
        return []
    if "train" not in names or len(names) < 2 or not names <= {"train", "val", "test"}:
        return []
    return [part for part in ("train", "val", "test") if part in names]


def _class_level(walk: _Walk, parent: _Folder, below: int, depth: int) -> list[_Folder]:
    folders, files = _list(walk, parent)
    for name in files:
        if below or not name.endswith(_OWN_FILES):
            walk.ignore(parent.inside(name))
    if not folders:
        where = walk.source / parent.relative
        images = any(name.lower().endswith(IMG_EXTENSIONS) for name in files)
        found = "images but no folders" if images else "no folders"
        expected = f"one folder per class, {depth} levels down" if depth > 1 else "one per class"
        raise UserError(f"{where} holds {found}; expected {expected}")
    return folders


def _images(walk: _Walk, folder: _Folder) -> list[str]:
    """Return the images under a class folder, in the order in which ImageFolder has them."""
    images = []
    for place, names in sorted(_walk(walk, folder)):
        good = [name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        if len(good) < len(names):
            for name in sorted(set(names).difference(good)):
                walk.ignore(f"{place}/{name}")
        images += [f"{place}/{name}" for name in good]
    return images


def _walk(walk: _Walk, start: _Folder) -> Iterator[tuple[str, list[str]]]:
    waiting = [start]
    while waiting:
        folder = waiting.pop()
        folders, files = _list(walk, folder)
        waiting += folders
        if walk.progress is not None:
            walk.progress(len(files))
        yield folder.relative, files


def _list(walk: _Walk, folder: _Folder) -> tuple[list[_Folder], list[str]]:
    """Return the folders and the sorted regular files of a folder; count the rest as ignored."""
    folders, files = [], []
    try:
        with os.scandir(walk.source / folder.relative) as entries:
            for entry in entries:
                kind = _kind(entry)
                if kind == "file":
                    files.append(entry.name)
                    continue
                child = folder.inside(entry.name)
                status = entry.stat() if kind == "folder" else None
                identity = (status.st_dev, status.st_ino) if status else None
                if identity is None or identity in folder.chain:
                    walk.ignore(child)
                else:
                    folders.append(_Folder(child, folder.chain | {identity}))
    except OSError as error:
        where = walk.source / folder.relative
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    return folders, sorted(files)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        # A pipe with the name of an image would stop whoever opens it.
        is_file = entry.is_file() or _is_broken_link(entry)
    except OSError:  # a link that leads to itself
        is_file = _is_broken_link(entry)
    return "file" if is_file else "other"


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    """Return whether the entry is a link to nowhere, or round to itself, with an image's name.

    It counts as an image, as with ImageFolder, so that one that got lost is found by name.
    """
    is_link = entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110 - never raises
    return is_link and entry.name.lower().endswith(IMG_EXTENSIONS)


def _no_images(source: Path, empty: list[str], classes: int) -> UserError:
    endings = ", ".join(IMG_EXTENSIONS)
    if len(empty) == classes:
        return UserError(f"{source}: no images in any class folder (an image ends in {endings})")
    folders = "class folder" if len(empty) == 1 else "class folders"
    return UserError(
        f"{source}: {folders} without images: {name_some(empty)}; "
        f"add images ({endings}) or remove what is empty"
    )


def name_some(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
