"""Encoded image files to pixels, the same pixels that Pillow gives.

Published accuracies were reached with Pillow, so every file decodes to what
`Image.open(file).convert("RGB")` (or `"L"`) gives: EXIF orientation is ignored, alpha is dropped,
palettes are expanded, gray is repeated for three channels, colour becomes gray by the ITU-R 601
luma. The one exception is gray of 16 bits, which Pillow clips to white above 255; here the high
byte is taken, as Pillow itself does with colour of 16 bits. The content of a file decides its
format; its name does not matter.
"""

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from sanctl.errors import UserError

# Without this list Pillow would also try formats that run other programs (EPS) or have no magic.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")
_HIGH_BYTE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_PNG_END = struct.pack(">I4sI", 0, b"IEND", 0xAE426082)
_TRUNCATED = "the file is truncated"


class ImageError(UserError):
    """An image cannot be read or decoded; the message names it and says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name}: {reason}; replace or remove it (`sanctl dataset check` finds all such files)"
        )
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        # An exception pickles as type(*args), and args here is the finished message.
        return ImageError, (self.name, self.reason)


class Decoded(NamedTuple):
    """An image with what its header says: `format` is Pillow's name of it, such as "JPEG"."""

    pixels: np.ndarray
    format: str


def decode_image(data: bytes | np.ndarray, channels: int, name: str) -> np.ndarray:
    """Decode one encoded image of any common kind.

    Args:
        data: The bytes of the file, or the same as a uint8 array.
        channels: 3 for RGB, 1 for gray.
        name: What an error calls the image, usually its path.

    Returns:
        uint8 pixels of shape (H, W, channels), RGB order.

    Raises:
        ImageError: The data is empty, truncated, not an image, or too large to be one.
    """
    return decode_with_format(data, channels, name).pixels


def decode_with_format(data: bytes | np.ndarray, channels: int, name: str) -> Decoded:
    """As `decode_image`, and tells the format that the content has."""
    blob = data if isinstance(data, bytes) else data.tobytes()
    if not blob:
        raise ImageError(name, "the file has zero bytes")
    with _silence():
        image = _open(blob, name)
        kind = image.format or "?"
        pixels = _decode_fast(blob, image, channels)
        if pixels is None:
            pixels = _decode_strict(blob, image, channels, name)
    return Decoded(pixels.reshape(*pixels.shape[:2], channels), kind)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what the image libraries say out of the user's terminal.

    libjpeg, libpng and OpenCV write their warnings to file descriptor 2 and take no handler from
    here; what matters of them comes back as an error anyway. It is meant for one decoding thread
    a process.
    """
    try:
        kept = os.dup(2)
    except OSError:  # the process was started without a standard error
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def _open(blob: bytes, name: str) -> Image.Image:
    """Read the header alone; the size is judged before any pixel is allocated."""
    try:
        return Image.open(io.BytesIO(blob), formats=_FORMATS)
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(
            name, f"its header asks for more than the {limit:,} pixels allowed"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(name, "it is not an image, or its header is damaged") from None
    except Exception as error:  # decoders raise whatever hostile bytes provoke
        raise ImageError(name, _reason(error)) from None


def _decode_fast(blob: bytes, image: Image.Image, channels: int) -> np.ndarray | None:
    """Decode by OpenCV where its pixels are Pillow's own; None where Pillow must decide.

    OpenCV may fill what a truncated file lacks with gray, so only files that end as their format
    demands come here.
    """
    whole = (image.format == "JPEG" and blob.endswith(_JPEG_END)) or (
        image.format == "PNG" and blob.endswith(_PNG_END)
    )
    gray = image.mode == "L" or (image.mode == "I;16" and image.format == "PNG")
    if not whole or not (gray or image.mode in ("RGB", "RGBA")):
        return None
    colour = cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR_RGB
    try:
        pixels = cv2.imdecode(np.frombuffer(blob, np.uint8), colour | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    if pixels is None or pixels.shape[:2] != (image.height, image.width):
        return None
    if channels == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB) if gray else pixels
    # OpenCV's luma rounds otherwise than Pillow's.
    return pixels if gray else np.array(Image.fromarray(pixels).convert("L"))


def _decode_strict(blob: bytes, image: Image.Image, channels: int, name: str) -> np.ndarray:
    """Decode by Pillow, which refuses what is cut short."""
    if not _has_end(blob, image.format):
        raise ImageError(name, _TRUNCATED)
    try:
        if image.mode in _HIGH_BYTE_MODES:
            high = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) >> 8
            image = Image.fromarray(high.astype(np.uint8))
        return np.array(image.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # decoders raise whatever hostile bytes provoke
        raise ImageError(name, _reason(error)) from None


def _has_end(blob: bytes, kind: str | None) -> bool:
    """Tell whether the end mark is there, which Pillow does not insist on in every case."""
    if kind == "PNG":
        return b"IEND" in blob
    if kind not in ("JPEG", "MPO"):
        return True
    # An end mark before the picture's own data is that of a thumbnail.
    place = 2
    while place < len(blob) and blob[place : place + 2] != _JPEG_SCAN:
        is_filler = blob[place + 1 : place + 2] == b"\xff"
        place += 1 if is_filler else 2 + int.from_bytes(blob[place + 2 : place + 4])
    return _JPEG_END in blob[place:]


def _reason(error: Exception) -> str:
    """Put into words why Pillow gave up."""
    says = (str(error) or type(error).__name__).splitlines()[0]
    cut = "truncated" in says.lower() or isinstance(error, EOFError)
    return _TRUNCATED if cut else f"it cannot be decoded ({says})"
