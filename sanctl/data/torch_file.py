"""Files written by `torch.save`, read so that a hostile one can neither run code nor fill memory.

torch's own `weights_only` keeps code out. It still builds whatever size a file declares, unpacks
compressed archives without a bound, and takes functions that allocate what their arguments say. So
a file is looked at before torch reads it, and what came out of it is looked at afterwards.
"""

import mmap as mapped
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Names that torch lets a pickle call, and that allocate what it asks for. What is left are dtypes,
# storages, and the ways to make plain tensors of them.
_ALLOCATING = re.compile(
    rb"\n(bytearray|\w*Tensor|UntypedStorage|TypedStorage|"
    rb"_rebuild_(?!tensor\n|tensor_v2\n|parameter\n)\w+)\n"
)

# Hashing such a tuple, as the key of a dict, would run through the end of the stack.
_BETWEEN = rb"(?:q.|r.{4})?(?:[N)\]}]|K.){0,2}"
_DEEP_TUPLES = [
    re.compile(code + rb"(?:" + _BETWEEN + code + rb"){1000}", re.DOTALL)
    for code in (rb"\x85", rb"\x86", rb"\x87", rb"t")
]
ZIP_START = b"PK\x03\x04"


class RefusedFileError(ValueError):
    """The file asks for what no data file needs; the message says what."""


class DamagedFileError(RefusedFileError):
    """The file is damaged, or of another kind."""

    def __init__(self) -> None:
        super().__init__("damaged, cut short or of another kind")


def load_torch_file(path: Path, mmap: bool = False) -> Any:
    """Read plain values and tensors that `torch.save` wrote.

    Args:
        path: The file.
        mmap: Map the tensors of a zip archive instead of reading them.

    Raises:
        RefusedFileError: See there, and DamagedFileError; nothing in the file was executed, and
            no more memory taken than a small multiple of its size.
        OSError: The file cannot be opened or read.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) == ZIP_START:  # by which torch decides as well
            _inspect_archive(path)
        else:
            _inspect_stream(file.fileno())
    content = _load(path, mmap)
    _inspect_tensors(content, path.stat().st_size)
    return content


def _load(path: Path, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it will refuse right afterwards
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever a hostile or damaged file provokes
        # torch's text goes over many lines, which advise to load the file with its code running.
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise RefusedFileError(f"it holds {named[1][:80]}") from error
        raise DamagedFileError from error


def _inspect_archive(path: Path) -> None:
    """Refuse an archive whose members take more room unpacked than in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise RefusedFileError("its archive is compressed, which torch never does")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise RefusedFileError("its archive claims more bytes than the file has")
            if len({member.filename for member in members}) < len(members):
                raise RefusedFileError("its archive holds two members of one name")
            for member in members:
                if member.filename.endswith("data.pkl"):
                    _inspect_pickle(archive.read(member))
    except RefusedFileError:
        raise
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise DamagedFileError from error


def _inspect_stream(descriptor: int) -> None:
    """Inspect a file of the older kind, whose pickles stand among the tensors' bytes."""
    try:
        with mapped.mmap(descriptor, 0, access=mapped.ACCESS_READ) as data:
            _refuse_deep_tuples(data)
            if _ALLOCATING.search(data):
                raise RefusedFileError("it calls functions that no data file needs")
    except ValueError as error:
        if isinstance(error, RefusedFileError):
            raise
        raise DamagedFileError from error


def _inspect_pickle(data: bytes) -> None:
    _refuse_deep_tuples(data)
    if not _ALLOCATING.search(data):
        return
    # A path may hold such a line by chance; the operations of the pickle tell for sure.
    for code, argument, _ in pickletools.genops(data):
        if code.name == "GLOBAL" and _ALLOCATING.fullmatch(
            f"\n{str(argument).rpartition(' ')[2]}\n".encode()
        ):
            raise RefusedFileError(f"it calls {str(argument).replace(' ', '.')[:80]}")


def _refuse_deep_tuples(data: bytes | mapped.mmap) -> None:
    if any(pattern.search(data) for pattern in _DEEP_TUPLES):
        raise RefusedFileError("it nests values too deep")


def _inspect_tensors(content: Any, size: int) -> None:
    """Refuse tensors that are not plain, or stand for more bytes than the file holds."""
    storages: dict[int, int] = {}
    for tensor in _tensors(content):
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_nested or tensor.is_neg():
            raise RefusedFileError("it holds a tensor of an unusual kind")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # A stride of 0 makes any number of elements out of one.
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise RefusedFileError("it holds a tensor larger than its data")
    if sum(storages.values()) > size:
        raise RefusedFileError("its tensors claim more bytes than the file has")


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, however deep, each container once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value
            if isinstance(value, dict):
                waiting += value.values()
