"""Packs (`*_imgs.pt`): all encoded images of a split in one file that is mapped, not read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from sanctl.data.atomic import atomic_write
from sanctl.data.index import ImageIndex
from sanctl.data.legacy import OldPack, read_old_pack
from sanctl.data.torch_file import RefusedFileError, load_torch_file
from sanctl.errors import UserError, shown

FORMAT = "sanctl.packed_images"
VERSION = 1


@dataclass(frozen=True, eq=False)
class PackedImages:
    """The images of a pack.

    Attributes:
        path: The file.
        classes: Class names.
        targets: Class index of every image, int64 of shape (images,).
        data: All encoded images end to end, uint8 of shape (bytes,).
        offsets: Where each image starts in `data`, and the end, int64 of shape (images + 1,).
        names: The paths of all images end to end in UTF-8, or None in a pack of old.
        name_offsets: Where each path starts in `names`, and the end.
    """

    path: Path
    classes: list[str]
    targets: NDArray[np.int64]
    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    names: NDArray[np.uint8] | None = None
    name_offsets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """Return the path that an image had when it was packed, or "image 5 of train_imgs.pt"."""
        if self.names is None or self.name_offsets is None:
            return f"image {index} of {self.path}"
        name = _slice(self.names, self.name_offsets, index).tobytes()
        try:
            return name.decode(*_NAME_CODING)
        except UnicodeDecodeError:  # a damaged or hostile pack
            return name.decode("utf-8", "replace")

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return the encoded bytes of an image, uint8 of shape (bytes,), without a copy."""
        return _slice(self.data, self.offsets, index)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the file again instead of receiving a copy of its bytes.
        if self.names is not None:
            return open_packed, (self.path,)
        return PackedImages, (self.path, self.classes, self.targets, self.data, self.offsets)


_NAME_CODING = ("utf-8", "surrogatepass")


def _slice(data: NDArray[np.uint8], offsets: NDArray[np.int64], index: int) -> NDArray[np.uint8]:
    return data[offsets[index] : offsets[index + 1]]


def write_packed(path: Path, index: ImageIndex, blob: BinaryIO, sizes: Sequence[int]) -> None:
    """Write a pack, atomically.

    Args:
        path: Where.
        index: Classes, and path and class of every image.
        blob: An open file with the encoded images end to end, in the order of the index; it is
            mapped, so that memory does not grow with it.
        sizes: Bytes of every image.

    Raises:
        SanctlError: The file cannot be written.
    """
    encoded = [name.encode(*_NAME_CODING) for name, _ in index.samples]
    names = np.frombuffer(bytearray(b"".join(encoded)), np.uint8)
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "classes": list(index.classes),
        "class_to_idx": index.class_to_idx,
        "data": torch.from_numpy(np.memmap(blob, np.uint8, "r+")),
        "offsets": _offsets(sizes),
        "targets": torch.from_numpy(index.targets),
        "names": torch.from_numpy(names),
        "name_offsets": _offsets([len(name) for name in encoded]),
        "extensions": tuple(index.extensions),
    }
    with atomic_write(path) as file:
        torch.save(payload, file)


def _offsets(sizes: Sequence[int]) -> torch.Tensor:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return torch.from_numpy(offsets)


def open_packed(path: Path) -> PackedImages:
    """Open a pack; nothing in the file is executed.

    The file is mapped: opening takes milliseconds whatever its size, and all processes share
    one copy in the page cache. A pack of old, a pickled list of io.BytesIO, is read into memory.

    Raises:
        UserError: The file is missing, damaged, of another kind, or carries code.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; `sanctl dataset pack` makes packs")
    try:
        payload = load_torch_file(path, mmap=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except RefusedFileError:  # an old pack, or whatever is damaged or hostile
        return _from_old(path, read_old_pack(path))
    kind = payload.get("format") if isinstance(payload, dict) else None
    if type(kind) is not str or kind != FORMAT:
        raise UserError(f"{path}: is not a pack of images; make one with `sanctl dataset pack`")
    version = payload.get("version")
    if type(version) is not int or version != VERSION:
        raise UserError(
            f"{path}: is a pack of version {shown(version)}, this program reads version "
            f"{VERSION}; update it, or make the pack again with `sanctl dataset pack`"
        )
    return _checked(path, payload)


def _from_old(path: Path, old: OldPack) -> PackedImages:
    offsets = _offsets([len(image) for image in old.images]).numpy()
    data = np.frombuffer(b"".join(old.images), np.uint8)
    return PackedImages(path, old.classes, np.array(old.targets, np.int64), data, offsets)


def _checked(path: Path, payload: dict[str, Any]) -> PackedImages:
    """Return a pack whose parts fit together."""
    classes = payload.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise _broken(path, "`classes` is not a list of names")

    def row(name: str, kind: torch.dtype) -> NDArray[Any]:
        value = payload.get(name)
        if not isinstance(value, torch.Tensor) or value.dtype != kind or value.ndim != 1:
            raise _broken(path, f"`{name}` is not a row of {str(kind).removeprefix('torch.')}")
        if not value.is_contiguous():
            raise _broken(path, f"`{name}` does not lie in one piece")
        return value.detach().numpy()

    targets, data, names = (
        row("targets", torch.int64),
        row("data", torch.uint8),
        row("names", torch.uint8),
    )
    offsets, name_offsets = row("offsets", torch.int64), row("name_offsets", torch.int64)
    for starts, content in ((offsets, data), (name_offsets, names)):
        if len(starts) != len(targets) + 1 or starts[0] != 0 or starts[-1] != len(content):
            raise _broken(path, "its parts have different lengths")
        if (np.diff(starts) < 0).any():
            raise _broken(path, "its images overlap")
    if len(targets) and not 0 <= targets.min() <= targets.max() < len(classes):
        raise _broken(path, f"a class index lies outside 0 to {len(classes) - 1}")
    return PackedImages(path, classes, targets, data, offsets, names, name_offsets)


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path}: a damaged pack: {what}; make it again with `sanctl dataset pack`")
