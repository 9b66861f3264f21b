"""The index of a dataset: its classes, and where each image lies (`*_init.pt`)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from sanctl.data.atomic import atomic_write
from sanctl.data.scan import Progress, name_some, scan_folder
from sanctl.data.torch_file import RefusedFileError, load_torch_file
from sanctl.errors import UserError

_PROBES = 32


@dataclass(frozen=True)
class ImageIndex:
    """Classes, and images as (path, class index).

    Attributes:
        classes: Class names; an image's class index counts into them.
        samples: (path with forward slashes, class index) of every image.
        extensions: File name extensions that count as images, lower case with the dot.
        root: The folder that relative paths start from.
    """

    classes: list[str]
    samples: list[tuple[str, int]]
    extensions: tuple[str, ...] = IMG_EXTENSIONS
    root: Path = field(default_factory=Path)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class index of every class name."""
        return {name: number for number, name in enumerate(self.classes)}

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Class index of every image, int64 of shape (images,)."""
        return np.fromiter((target for _, target in self.samples), np.int64, len(self.samples))

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Images of every class, int64 of shape (classes,)."""
        return np.bincount(self.targets, minlength=len(self.classes))

    def path(self, position: int) -> Path:
        """Return where an image lies."""
        return self.root / self.samples[position][0]

    def members(self) -> list[NDArray[np.int64]]:
        """Return, for every class, the positions of its images, in the index's order."""
        order = np.argsort(self.targets, kind="stable")
        return np.split(order, np.cumsum(self.counts)[:-1])

    def subset(self, positions: Iterable[int]) -> "ImageIndex":
        """Return an index of the images at these positions, with the same classes."""
        return replace(self, samples=[self.samples[position] for position in positions])

    def file_keys(self) -> list[str]:
        """Return one string for every image that tells files apart, however they are written.

        `a/x.png`, `./a/x.png` and an absolute path of the same file have one key, and so have
        paths through linked folders.
        """

        @cache
        def real(folder: str) -> str:
            return (self.root / folder).resolve().as_posix()

        parts = (path.rpartition("/") for path, _ in self.samples)
        return [f"{real(folder + slash)}/{name}" for folder, slash, name in parts]


def index_folder(
    source: Path, depth: int = 1, progress: Progress | None = None
) -> tuple[ImageIndex, list[Path]]:
    """Index a folder of class folders.

    Args:
        source: The folder.
        depth: How many levels below `source` the class folders lie; at 2, a class is named
            "Balinese/character01".
        progress: Called with the number of files found since the last call.

    Returns:
        The index, with `source` as its root, and the files and folders that were left out.

    Raises:
        UserError: The folder is missing or unreadable, has no class folders, or a class folder
            holds no image.
    """
    classes, samples, ignored = scan_folder(source, depth, progress)
    return ImageIndex(classes, samples, root=source), ignored


def require_same_classes(indexes: dict[str, ImageIndex]) -> None:
    """Raise a UserError that names the classes which not every part of a dataset has."""
    first, *others = indexes
    for other in others:
        ours, theirs = set(indexes[first].classes), set(indexes[other].classes)
        for lacking, having, classes in (
            (other, first, ours - theirs),
            (first, other, theirs - ours),
        ):
            if classes:
                raise UserError(
                    f"{indexes[lacking].root}: no folder for {name_some(sorted(classes))}, "
                    f"which {having} has; every part needs the same classes"
                )


def save_index(index: ImageIndex, path: Path) -> None:
    """Write an index, atomically; paths become relative to the file's folder where they can be.

    They can be where the image lies under that folder or under the folder above it; others are
    written as absolute paths.

    Raises:
        SanctlError: The file cannot be written.
    """
    with atomic_write(path) as file:
        write_index(index, file, path.parent)


def write_index(index: ImageIndex, file: BinaryIO, folder: Path) -> None:
    """Write an index to an open file that will lie in `folder`."""
    payload = {
        "classes": list(index.classes),
        "class_to_idx": index.class_to_idx,
        "samples": _relative_to(folder, index),
        "extensions": tuple(index.extensions),
    }
    torch.save(payload, file)


def _relative_to(folder: Path, index: ImageIndex) -> list[tuple[str, int]]:
    root, base = index.root.absolute(), folder.absolute()
    if not root.is_relative_to(base.parent):
        root, base = index.root.resolve(), folder.resolve()
    start, inside, beside = (
        f"{place.as_posix().rstrip('/')}/" for place in (root, base, base.parent)
    )

    def relative(path: str) -> str:
        whole = path if path.startswith("/") else start + path
        if whole.startswith(inside):
            return whole[len(inside) :]
        if whole.startswith(beside):
            return f"../{whole[len(beside) :]}"
        return whole

    return [(relative(path), target) for path, target in index.samples]


def load_index(path: Path) -> ImageIndex:
    """Read an index; nothing in the file is executed.

    Relative paths start from the file's folder; where no image lies there, as in files of older
    programs, they start from the current folder.

    Raises:
        UserError: The file is missing, damaged, of another kind, carries code, or contradicts
            itself.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; `sanctl dataset index` makes an index")
    try:
        payload = load_torch_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except RefusedFileError as refusal:
        raise UserError(
            f"{path}: refused: {refusal}; an index holds plain lists of paths and classes: make it "
            "again with `sanctl dataset index`"
        ) from None
    classes, samples, extensions = _checked(payload, path)
    return ImageIndex(classes, samples, extensions, _find_root(samples, path.parent))


def _find_root(samples: list[tuple[str, int]], folder: Path) -> Path:
    probes = [name for name, _ in samples[:: max(1, len(samples) // _PROBES)]]
    probes = [name for name in probes if not name.startswith("/")]
    found_from_here = any(is_file(Path(name)) for name in probes)
    if found_from_here and not any(is_file(folder / name) for name in probes):
        return Path()
    return folder


def is_file(path: Path) -> bool:
    """Return whether a file is there; names that no file can have are no error."""
    return os.path.isfile(path)  # noqa: PTH113 - pathlib's raises on names that are too long


def _checked(payload: Any, path: Path) -> tuple[list[str], list[tuple[str, int]], tuple[str, ...]]:
    """Return the parts of an index whose every part is what it should be."""
    if not isinstance(payload, dict) or not {"classes", "samples"} <= payload.keys():
        raise _broken(path, "it has no `classes` and `samples`")
    classes, samples = payload["classes"], payload["samples"]
    if not _is_strings(classes) or not classes or len(set(classes)) != len(classes):
        raise _broken(path, "`classes` is not a list of different names")
    numbers = payload.get("class_to_idx")
    if numbers is not None and not _numbers_in_order(numbers, classes):
        raise _broken(path, "`class_to_idx` does not number `classes` from 0")
    if not isinstance(samples, list | tuple):
        raise _broken(path, "`samples` is not a list")
    for position, sample in enumerate(samples):
        if not _is_sample(sample, len(classes)):
            raise _broken(
                path,
                f"`samples` entry {position} is not (path, class index 0 to {len(classes) - 1})",
            )
    extensions = payload.get("extensions", IMG_EXTENSIONS)
    if not _is_strings(extensions):
        raise _broken(path, "`extensions` is not a list of file name extensions")
    return list(classes), [(name, target) for name, target in samples], tuple(extensions)


def _numbers_in_order(numbers: Any, classes: list[str] | tuple[str, ...]) -> bool:
    return (
        isinstance(numbers, dict)
        and all(type(name) is str and type(number) is int for name, number in numbers.items())
        and numbers == {name: number for number, name in enumerate(classes)}
    )


def _is_strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is str for item in value)


def _is_sample(sample: Any, classes: int) -> bool:
    return (
        isinstance(sample, list | tuple)
        and len(sample) == 2
        and type(sample[0]) is str
        and type(sample[1]) is int
        and 0 <= sample[1] < classes
    )


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path}: no usable index: {what}; make it again with `sanctl dataset index`")
