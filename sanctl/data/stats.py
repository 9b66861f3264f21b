"""Figures of a dataset: images per class, sizes, formats, and mean and deviation of the pixels."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from sanctl.data.atomic import atomic_write
from sanctl.data.decode import ImageError, decode_with_format
from sanctl.data.scan import Progress
from sanctl.data.source import ImageSource
from sanctl.data.workers import Chunks, Workers

_CHUNK = 32


@dataclass
class PixelSums:
    """Exact sums over pixels of 0..255, in whole numbers that cannot overflow."""

    pixels: int = 0
    sums: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Add the pixels of an image of shape (H, W, C)."""
        # OpenCV sums in doubles, which are exact for fewer than 2^53 / 255^2 = 1.4e11 pixels.
        sums = cv2.sumElems(image)[: image.shape[2]]
        squares = cv2.sumElems(np.square(image, dtype=np.uint16))[: image.shape[2]]
        self._add(image.shape[0] * image.shape[1], list(map(int, sums)), list(map(int, squares)))

    def merge(self, other: "PixelSums") -> None:
        """Add what another has summed."""
        if other.pixels:
            self._add(other.pixels, other.sums, other.squares)

    def _add(self, pixels: int, sums: list[int], squares: list[int]) -> None:
        self.pixels += pixels
        self.sums = [a + b for a, b in zip(self.sums or [0] * len(sums), sums, strict=True)]
        self.squares = [
            a + b for a, b in zip(self.squares or [0] * len(squares), squares, strict=True)
        ]

    def mean(self) -> list[float]:
        """Mean of every channel, pixels scaled to 0..1."""
        return [total / (255 * self.pixels) for total in self.sums]

    def std(self) -> list[float]:
        """Standard deviation of every channel over all pixels, scaled to 0..1."""
        count = self.pixels
        return [
            ((count * square - total * total) / (255 * count) ** 2) ** 0.5
            for total, square in zip(self.sums, self.squares, strict=True)
        ]


class Spread(NamedTuple):
    """Smallest, middle and largest of several numbers."""

    least: int
    median: float
    most: int

    @classmethod
    def of(cls, values: NDArray[np.integer]) -> "Spread":
        """Spread of a row of numbers, zeros where it is empty."""
        if not len(values):
            return cls(0, 0.0, 0)
        return cls(int(values.min()), float(np.median(values)), int(values.max()))


@dataclass(frozen=True)
class PartStats:
    """Figures of one part of a dataset.

    Attributes:
        counts: Images of every class, by its name.
        width: Of the readable images, in px.
        height: Of the readable images, in px.
        formats: Readable images of every format, such as "JPEG", the most frequent first.
        mean: Of every channel over all pixels, scaled to 0..1; empty where nothing is readable.
        std: As `mean`, the standard deviation.
        unreadable: Images that cannot be decoded; they count for their class alone.
    """

    counts: dict[str, int]
    width: Spread
    height: Spread
    formats: dict[str, int]
    mean: list[float]
    std: list[float]
    unreadable: int

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(self.counts.values())

    @property
    def per_class(self) -> Spread:
        """Spread of the images of a class."""
        return Spread.of(np.array(list(self.counts.values()), np.int64))


class _ChunkStats(NamedTuple):
    sizes: NDArray[np.int32]
    formats: Counter[str]
    sums: PixelSums


def measure_source(
    source: ImageSource, channels: int, workers: int, progress: Progress | None = None
) -> PartStats:
    """Look at every pixel of a part of a dataset; memory grows by two numbers for each image.

    Args:
        source: The images.
        channels: 3 measures red, green and blue, 1 gray.
        workers: Processes that decode; 0 does so in this one.
        progress: Called with the number of images done since the last call.
    """
    sizes = [np.empty((0, 2), np.int32)]
    formats: Counter[str] = Counter()
    sums = PixelSums()
    chunks = Chunks(len(source), _CHUNK)
    for done, chunk in zip(
        chunks, Workers(partial(_measure, source, channels), chunks, workers), strict=True
    ):
        sizes.append(chunk.sizes)
        formats += chunk.formats
        sums.merge(chunk.sums)
        if progress is not None:
            progress(len(done))
    counts = np.bincount(source.targets, minlength=len(source.classes))
    width, height = np.concatenate(sizes).T
    return PartStats(
        counts=dict(zip(source.classes, counts.tolist(), strict=True)),
        width=Spread.of(width),
        height=Spread.of(height),
        formats=dict(formats.most_common()),
        mean=sums.mean(),
        std=sums.std(),
        unreadable=len(source) - len(width),
    )


def _measure(source: ImageSource, channels: int, indices: list[int]) -> _ChunkStats:
    sizes: list[tuple[int, int]] = []
    formats: Counter[str] = Counter()
    sums = PixelSums()
    for index in indices:
        try:
            image = decode_with_format(source.read(index), channels, source.name(index))
        except ImageError:
            continue
        sizes.append((image.pixels.shape[1], image.pixels.shape[0]))
        formats[image.format] += 1
        sums.add(image.pixels)
    return _ChunkStats(np.array(sizes, np.int32).reshape(-1, 2), formats, sums)


def class_rows(parts: Mapping[str, PartStats]) -> list[tuple[str, list[int]]]:
    """Return every class with its images in each part, in the order in which parts name them."""
    names = dict.fromkeys(name for part in parts.values() for name in part.counts)
    return [(name, [part.counts.get(name, 0) for part in parts.values()]) for name in names]


def write_stats_csv(parts: Mapping[str, PartStats], path: Path) -> None:
    """Write a row for every class: its name, and its images in each part.

    Raises:
        SanctlError: The file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", *parts])
    writer.writerows([name, *counts] for name, counts in class_rows(parts))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def write_stats_json(parts: Mapping[str, PartStats], path: Path) -> None:
    """Write all figures of every part.

    Raises:
        SanctlError: The file cannot be written.
    """
    with atomic_write(path) as file:
        text = json.dumps({part: _as_json(stats) for part, stats in parts.items()}, indent=2)
        file.write(f"{text}\n".encode())


def _as_json(stats: PartStats) -> dict[str, Any]:
    return {
        "images": stats.images,
        "unreadable": stats.unreadable,
        "images_per_class": stats.per_class._asdict(),
        "width": stats.width._asdict(),
        "height": stats.height._asdict(),
        "formats": stats.formats,
        "mean": stats.mean,
        "std": stats.std,
        "classes": stats.counts,
    }
