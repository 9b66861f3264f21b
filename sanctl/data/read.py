"""The bytes of an image's file."""

import os
import stat
from pathlib import Path

from sanctl.data.decode import ImageError

_MOST_BYTES = 1 << 30
# Opening a pipe would otherwise wait for somebody to write to it.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_image(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        ImageError: It is missing, cannot be read, is no regular file, or larger than any image.
    """
    try:
        with open(os.open(path, _FLAGS), "rb") as file:  # noqa: PTH123 - of a descriptor
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(str(path), "it is not a regular file")
            if status.st_size > _MOST_BYTES:
                raise ImageError(str(path), "it is larger than any image")
            return file.read()
    except OSError as error:
        raise ImageError(str(path), f"it cannot be read ({error.strerror})") from None
    except ValueError:  # a zero byte, or half of a character
        raise ImageError(str(path), "no file can have this name") from None
