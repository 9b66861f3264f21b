"""Files that are either whole or not there: written beside their place, then renamed into it."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sanctl.errors import SanctlError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its place only once it is complete and on the disk.

    The bytes go to a hidden file in the same folder (made when missing), which is flushed and
    renamed when the block ends, and removed when the block fails. A reader sees the previous file
    or the new one, never a part.

    Args:
        path: Where the file is to appear.

    Yields:
        The open binary file.

    Raises:
        SanctlError: The disk is full, or the folder cannot be written to; the previous file is
            intact.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _disk_error(error)
        if cause is None:
            raise
        raise disk_failure(path, cause) from error
    _flush_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while writing have left in a folder.

    The caller makes sure that nobody is writing there.
    """
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def disk_failure(path: Path, error: OSError) -> SanctlError:
    """Return what to raise when `path` cannot be written."""
    left = "the previous file is intact" if path.exists() else "nothing was written"
    return SanctlError(
        f"cannot write {path}: {error.strerror or error}; {left}; "
        f"free space in {path.parent.absolute()} or choose another folder"
    )


def _disk_error(error: BaseException) -> OSError | None:
    """Return the OSError behind an error; torch.save covers it by a RuntimeError of its own."""
    if isinstance(error, OSError):
        return error
    if not isinstance(error, RuntimeError):
        return None
    context = error.__context__
    while context is not None and not isinstance(context, OSError):
        context = context.__context__
    return context


def _flush_folder(folder: Path) -> None:
    # The file is complete by now; a file system that cannot flush a folder is no failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
