"""One image's way into a pack: as it is, or smaller."""

import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from sanctl.data.decode import ImageError, decode_with_format
from sanctl.data.read import read_image

JPEG_QUALITY = 95


class Shrunk(NamedTuple):
    """An encoded image, and whether it is smaller than its file showed it."""

    data: bytes
    is_smaller: bool


def shrink_file(path: Path, short_side: int) -> Shrunk:
    """Read a file, and shrink the image in it as `shrink` does.

    Raises:
        ImageError: The file is missing, unreadable or damaged.
    """
    return shrink(read_image(path), short_side, str(path))


def shrink(data: bytes, short_side: int, name: str) -> Shrunk:
    """Return an image no larger than needed.

    One whose short side is at most `short_side` px keeps its very bytes. A larger one is resized
    by area and encoded again, a JPEG as JPEG, any other as PNG, with the pixels that training
    would have seen: 8 bits, one channel of gray or three of colour, no alpha, no rotation.

    Args:
        data: The file.
        short_side: In px.
        name: What an error calls the image.

    Raises:
        ImageError: The image is damaged.
    """
    pixels, kind = decode_with_format(data, 3, name)
    height, width = pixels.shape[:2]
    if min(height, width) <= short_side:
        return Shrunk(data, False)
    if _is_gray(data):
        pixels = pixels[..., :1]
    scale = short_side / min(height, width)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return Shrunk(_encode(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), kind, name), True)


def _is_gray(data: bytes) -> bool:
    # The image was decoded already, so its header opens.
    with Image.open(io.BytesIO(data)) as image:
        return Image.getmodebase(image.mode) == "L"


def _encode(pixels: np.ndarray, kind: str, name: str) -> bytes:
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    ending, options = (
        (".png", [])
        if kind != "JPEG"
        else (
            ".jpg",
            [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY],
        )
    )
    done, encoded = cv2.imencode(ending, pixels, options)
    if not done:
        raise ImageError(name, "it cannot be encoded again")
    return encoded.tobytes()
