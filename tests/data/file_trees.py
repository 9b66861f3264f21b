"""Small folders of images for the tests of data."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np

PNG = cv2.imencode(".png", np.full((2, 2), 200, np.uint8))[1].tobytes()
"""A gray image of 2 x 2 px."""


def write_tree(folder: Path, files: Iterable[str], data: bytes = PNG) -> Path:
    """Write the same bytes to files below a folder, which is returned."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_classes(folder: Path, counts: Mapping[str, int]) -> Path:
    """Write a class folder of `counts` images for each class."""
    return write_tree(
        folder, [f"{name}/{i:04d}.png" for name, count in counts.items() for i in range(count)]
    )


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth uint8 image (H, W) or (H, W, C) that survives JPEG and resizing well."""
    random = np.random.default_rng(seed)
    coarse = random.integers(64, 192, (4, 4, channels), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image: np.ndarray, ending: str = ".jpg") -> bytes:
    """Encode an image; channels in OpenCV's order."""
    return cv2.imencode(ending, image)[1].tobytes()
