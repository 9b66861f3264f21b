"""A run folder belongs to one run at a time."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from sanctl.data.atomic import disk_failure
from sanctl.errors import UserError, shown

_NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_LONGEST = 1000  # bytes that are read of what a holder says of itself


@contextmanager
def claimed(root: Path) -> Iterator[list[str]]:
    """Keep a run folder to this process while the block runs.

    The lock is one of POSIX on a file in the folder. It goes with the process, however that ends;
    data workers, which may outlive it for seconds, do not inherit it; and NFS carries it to other
    machines. What was made for it, the folder too where nothing has come into it, goes at the end.

    Args:
        root: The run's folder; made where it is missing.

    Yields:
        What the user should know: that the file system has no locks, if so.

    Raises:
        UserError: Another process has the folder; says which.
        SanctlError: The folder cannot be written to.
    """
    path = root / _NAME
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        descriptor, notes = _lock(path)
    except OSError as error:
        raise disk_failure(path, error) from error
    try:
        yield notes
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked: nobody else can have locked it yet
        os.close(descriptor)
        with contextlib.suppress(OSError):  # the first that is not empty ends this
            for folder in missing:
                folder.rmdir()


def _lock(path: Path) -> tuple[int, list[str]]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # one that ends has just removed the folder
            continue
        notes = _locked(path, descriptor)
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # one that ends has just removed the file
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_own_name()).encode())
    return descriptor, notes


def _locked(path: Path, descriptor: int) -> list[str]:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, _LONGEST)
        if error.errno in _HELD:
            os.close(descriptor)
            raise UserError(
                f"{path.parent}: a run is under way there already ({_described(holder)}); wait for "
                "it to end, or choose another folder with -o TRAIN.save_path=FOLDER"
            ) from error
        return [
            f"{path.parent}: its file system has no locks ({error.strerror}), so nothing keeps "
            "another run from writing there too"
        ]
    return []


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _own_name() -> dict[str, object]:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _described(holder: bytes) -> str:
    try:
        said = json.loads(holder)
        pid, host, since = (said[key] for key in ("pid", "host", "since"))
    except (ValueError, TypeError, KeyError):  # it has not come to saying it
        return "another process"
    return f"process {shown(pid)} on {_plain(host)} since {_plain(since)}"


def _plain(value: object) -> str:
    return shown(value).strip("'")
