"""Where the encoded images of a split come from: folders, index files, packs or text files.

Every source gives the same few things, so that nothing after it knows how the data is stored.
What a source holds for each sample lies in numpy arrays: a list of millions of strings would be
copied into each worker process, page by page, as its reference counts are touched.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sanctl.config.schema import DataConfig
from sanctl.data.index import ImageIndex, index_folder, load_index, require_same_classes
from sanctl.data.inside import require_inside
from sanctl.data.packed import open_packed
from sanctl.data.read import read_image
from sanctl.data.scan import name_some
from sanctl.data.txt_mappings import load_txt_mappings
from sanctl.errors import UserError

Split = Literal["train", "val", "test"]

_ALLOW = "DATA.allow_outside: true (-o DATA.allow_outside=true)"


class ImageSource(Protocol):
    """The encoded images of one split with their classes."""

    @property
    def classes(self) -> list[str]:
        """Class names; a target counts into them."""
        ...

    @property
    def targets(self) -> NDArray[np.int64]:
        """Class index of every image, int64 of shape (images,)."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """What a message calls the image: its path, or its entry in a pack."""
        ...

    def read(self, index: int, /) -> bytes | NDArray[np.uint8]:
        """The encoded bytes of an image."""
        ...


class TextTable:
    """Many strings end to end in one buffer."""

    def __init__(self, texts: Iterable[str]) -> None:
        # surrogatepass keeps file names that are not valid UTF-8.
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        lengths = np.fromiter((len(text) for text in encoded), np.int64, len(encoded))
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._buffer = np.frombuffer(b"".join(encoded), np.uint8)

    def __getitem__(self, index: int) -> str:
        begin, end = self._offsets[index : index + 2]
        return self._buffer[begin:end].tobytes().decode("utf-8", "surrogatepass")


class FileSource:
    """Images that are single files.

    Args:
        index: The classes and samples.
    """

    def __init__(self, index: ImageIndex) -> None:
        self.classes = index.classes
        self.targets = index.targets
        self._root = index.root
        self._paths = TextTable(path for path, _ in index.samples)

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self._root / self._paths[index]

    def name(self, index: int) -> str:
        """The path of an image."""
        return str(self.path(index))

    def read(self, index: int) -> bytes:
        """The bytes of a file.

        Raises:
            ImageError: The file is missing, cannot be read, or is no regular file.
        """
        return read_image(self.path(index))


def open_source(data: DataConfig, split: Split) -> ImageSource:
    """Open one split of the dataset that a configuration names.

    Args:
        data: The section DATA; `dataset_init` says how the images are stored.
        split: "train", "val" or "test".

    Raises:
        UserError: A folder or file is missing or unreadable, a split has no images, a class of
            the training split has none, the classes are not as many as DATA.classes, or an image
            lies outside the folder without DATA.allow_outside.
    """
    root = Path(data.data_root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set DATA.data_root to the folder of the dataset")
    source, origin = _OPENERS[data.dataset_init](root, split, data.allow_outside)
    _validate(source, origin, data, split)
    return source


def _open_folder(root: Path, split: Split, allow_outside: bool) -> tuple[ImageSource, Path]:
    folder = root / split
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; dataset_init image_folder needs class folders in it "
            f"(or run `sanctl dataset index {root}` and `sanctl dataset split`, and set "
            "DATA.dataset_init: preprocessed_paths)"
        )
    index, _ = index_folder(folder)
    train = root / "train"
    if split != "train" and train.is_dir():
        # Classes are numbered by their order: a folder more or less would shift them.
        classes = [entry.name for entry in train.iterdir() if entry.is_dir()]
        classes = sorted(name for name in classes if not name.startswith("."))
        require_same_classes({"train": ImageIndex(classes, [], root=train), split: index})
    return FileSource(index), folder


def _open_index(root: Path, split: Split, allow_outside: bool) -> tuple[ImageSource, Path]:
    path = root / f"{split}_init.pt"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; run `sanctl dataset index` and `sanctl dataset split {root}`"
        )
    index = load_index(path)
    return FileSource(index if allow_outside else require_inside(index, path, _ALLOW)), path


def _open_pack(root: Path, split: Split, allow_outside: bool) -> tuple[ImageSource, Path]:
    path = root / f"{split}_imgs.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `sanctl dataset pack {root}`")
    return open_packed(path), path


def _open_txt(root: Path, split: Split, allow_outside: bool) -> tuple[ImageSource, Path]:
    index, path = load_txt_mappings(root, split), root / f"{split}.txt"
    return FileSource(index if allow_outside else require_inside(index, path, _ALLOW)), path


_OPENERS = {
    "image_folder": _open_folder,
    "preprocessed_paths": _open_index,
    "byte_imgs": _open_pack,
    "txt_mappings": _open_txt,
}


def _validate(source: ImageSource, origin: Path, data: DataConfig, split: Split) -> None:
    if len(source) == 0:
        raise UserError(f"{origin}: holds no images; the {split} split needs some")
    if len(source.classes) != data.classes:
        raise UserError(
            f"{origin}: has {len(source.classes)} classes, but DATA.classes is {data.classes}; "
            f"set DATA.classes: {len(source.classes)}"
        )
    counts = np.bincount(source.targets, minlength=data.classes)
    if split == "train" and counts.min() == 0:
        empty = [source.classes[k] for k in np.flatnonzero(counts == 0)]
        raise UserError(
            f"{origin}: no images of class {name_some(empty)}; add images or leave the class out"
        )
