"""Files that cannot be images, told by their first bytes alone."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sanctl.data.index import ImageIndex
from sanctl.data.scan import Progress

# JPEG, PNG, GIF, BMP, TIFF (either byte order, classic and big), JPEG 2000 (file, codestream).
_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
_HEAD_BYTES = 16
_BATCH = 256
_THREADS = 8


def can_be_image(head: bytes) -> bool:
    """Return whether a file that starts with these 16 bytes can be an image."""
    if head.startswith(_STARTS):
        return True
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return True
    return head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3].isspace()


def find_non_images(index: ImageIndex, progress: Progress | None = None) -> list[Path]:
    """Return the files of an index that are empty, unreadable, or start as no image does.

    It reads 16 bytes of every file, several files at a time since a network drive answers
    slowly; whether the rest of a file is sound is not its question.

    Args:
        index: The index.
        progress: Called with the number of files read since the last call.
    """
    found: list[Path] = []
    starts = range(0, len(index), _BATCH)
    with ThreadPoolExecutor(_THREADS) as threads:
        for first in range(0, len(starts), _THREADS):
            wave = starts[first : first + _THREADS]
            for bad in threads.map(lambda start: _non_images(index, start), wave):
                found += bad
            if progress is not None:
                progress(min(wave[-1] + _BATCH, len(index)) - wave[0])
    return found


def _non_images(index: ImageIndex, start: int) -> list[Path]:
    paths = (index.path(at) for at in range(start, min(start + _BATCH, len(index))))
    return [path for path in paths if not can_be_image(_head(path))]


def _head(path: Path) -> bytes:
    try:
        # Half as long as through a file object, which counts for millions of files.
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, _HEAD_BYTES)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
