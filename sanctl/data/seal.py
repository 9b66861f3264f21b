"""A checksum at the end of a file of `torch.save`: the comment of its zip archive.

Every reader of zip archives passes over the comment, so that the file stays one that torch and
other programs load, mapped or not. What the checksum is of is the file as torch wrote it, whose
comment was empty.
"""

import hashlib
import os
import re
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sanctl.data.torch_file import ZIP_START, DamagedFileError

_MARK = b"sanctl sha256 "
_LENGTH = len(_MARK) + 2 * hashlib.sha256().digest_size
_COUNT = _LENGTH.to_bytes(2, "little")
_NO_COMMENT = bytes(len(_COUNT))
_SEAL = re.compile(re.escape(_COUNT + _MARK) + rb"([0-9a-f]{64})", re.DOTALL)
# An archive without a comment ends with this record of fixed length.
_PLAIN_END = re.compile(rb"PK\x05\x06.{16}\0\0", re.DOTALL)
_PLAIN_END_LENGTH = 22
_CHUNK = 1 << 20


class ChecksumError(DamagedFileError):
    """The file is not what was written."""


class _Hashing:
    """A binary file for `torch.save`, which takes the checksum of what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save_sealed(content: Any, file: BinaryIO) -> None:
    """Write plain values and tensors as `torch.save` does, with a checksum at the end.

    Args:
        content: What to write.
        file: Open for writing, and empty.
    """
    hashing = _Hashing(file)
    torch.save(content, hashing)  # type: ignore[arg-type]  # it asks for a whole IO[bytes]
    file.seek(-len(_NO_COMMENT), os.SEEK_END)
    file.write(_COUNT + _MARK + hashing.digest.hexdigest().encode())


def require_whole(path: Path) -> None:
    """Compare a file with its checksum, if it carries one.

    Raises:
        ChecksumError: It is not what was written.
        DamagedFileError: It is an archive that ends neither with a checksum nor without a comment.
        OSError: It cannot be opened or read.
    """
    with path.open("rb") as file:
        archive = file.read(len(ZIP_START)) == ZIP_START
        size = file.seek(0, os.SEEK_END)
        body = max(0, size - _LENGTH - len(_COUNT))
        file.seek(body)
        end = file.read()
        if seal := _SEAL.fullmatch(end):
            if _digest(file, body) != seal[1]:
                raise ChecksumError
        elif archive and not _PLAIN_END.fullmatch(end[-_PLAIN_END_LENGTH:]):
            raise DamagedFileError


def _digest(file: BufferedReader, length: int) -> bytes:
    """The checksum of so many bytes and no comment."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    file.seek(0)
    while length and (count := file.readinto(buffer[: min(length, _CHUNK)])):
        digest.update(buffer[:count])
        length -= count
    digest.update(_NO_COMMENT)
    return digest.hexdigest().encode()
