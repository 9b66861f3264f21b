"""What is wrong with the images of a dataset: damaged files, duplicates, leaks between parts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sanctl.data.decode import ImageError, decode_image
from sanctl.data.scan import Progress
from sanctl.data.source import ImageSource
from sanctl.data.workers import Chunks, Workers

_CHUNK = 32
_DIGEST_BYTES = 16
_DAMAGED = bytes(_DIGEST_BYTES)


class Damaged(NamedTuple):
    """An image that cannot be read or decoded, and why."""

    part: str
    name: str
    reason: str


class Copy(NamedTuple):
    """One of several images that are the same, byte for byte."""

    part: str
    name: str
    label: str


@dataclass(frozen=True)
class Findings:
    """What a check found.

    Attributes:
        images: How many images were looked at.
        damaged: Those that training would fail on.
        duplicates: Groups of the same image within one part.
        leaks: Groups of the same image that reach over several parts.
    """

    images: int
    damaged: list[Damaged]
    duplicates: list[list[Copy]]
    leaks: list[list[Copy]]

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.damaged or self.duplicates or self.leaks)


class _ChunkCheck(NamedTuple):
    digests: bytes
    damaged: list[tuple[str, str]]


def check_parts(
    parts: Mapping[str, ImageSource], workers: int, progress: Progress | None = None
) -> Findings:
    """Read and decode every image of a dataset once; nothing is written.

    Memory grows by 16 bytes for each image.

    Args:
        parts: The images, by the name of their part.
        workers: Processes that read and decode; 0 does so in this one.
        progress: Called with the number of images done since the last call.
    """
    damaged: list[Damaged] = []
    digests = []
    for part, source in parts.items():
        chunks = Chunks(len(source), _CHUNK)
        results = Workers(partial(_check, source), chunks, workers)
        for done, chunk in zip(chunks, results, strict=True):
            digests.append(chunk.digests)
            damaged += [Damaged(part, name, reason) for name, reason in chunk.damaged]
            if progress is not None:
                progress(len(done))
    groups = _groups(parts, np.frombuffer(b"".join(digests), f"S{_DIGEST_BYTES}"))
    return Findings(
        images=sum(len(source) for source in parts.values()),
        damaged=damaged,
        duplicates=[group for group in groups if len({copy.part for copy in group}) == 1],
        leaks=[group for group in groups if len({copy.part for copy in group}) > 1],
    )


def _check(source: ImageSource, indices: list[int]) -> _ChunkCheck:
    digests, damaged = [], []
    for index in indices:
        name = source.name(index)
        try:
            data = source.read(index)
            decode_image(data, 3, name)
        except ImageError as error:
            damaged.append((name, error.reason))
            digests.append(_DAMAGED)
            continue
        digests.append(hashlib.blake2b(bytes(data), digest_size=_DIGEST_BYTES).digest())
    return _ChunkCheck(b"".join(digests), damaged)


def _groups(parts: Mapping[str, ImageSource], digests: NDArray[np.bytes_]) -> list[list[Copy]]:
    """Return the images with equal digests, in groups ordered by their first image."""
    places = [(part, source) for part, source in parts.items()]
    starts = np.cumsum([0] + [len(source) for _, source in places])
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    # An array of bytes drops trailing zeros, so that the mark of a damaged image reads as empty.
    several = np.flatnonzero((counts[inverse] > 1) & (digests != b""))
    groups: dict[int, list[Copy]] = {}
    for position in several.tolist():
        place = int(np.searchsorted(starts, position, side="right")) - 1
        part, source = places[place]
        index = position - int(starts[place])
        copy = Copy(part, source.name(index), source.classes[source.targets[index]])
        groups.setdefault(int(inverse[position]), []).append(copy)
    return list(groups.values())
