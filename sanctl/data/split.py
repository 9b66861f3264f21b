"""Stratified parts of a dataset: training, validation and, where asked for, test."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sanctl.data.atomic import atomic_write
from sanctl.data.index import ImageIndex, write_index
from sanctl.errors import UserError

PARTS = ("train", "val", "test")
"""Names of the parts, in the order of the ratios."""

_TOLERANCE = 1e-9


def split_index(index: ImageIndex, ratios: Sequence[float], seed: int) -> list[ImageIndex]:
    """Split every class by the same ratios.

    Each part gets of every class within one image of its ratio, and at least one image. Which
    images they are depends on the seed, the class name and the sorted paths of the class alone:
    neither the order of the index nor the other classes matter.

    Args:
        index: What to split.
        ratios: Shares of the parts, each between 0 and 1. Where they add up to less than 1,
            the rest is one more part.
        seed: Draws the images.

    Returns:
        Two or three indexes with the classes of the whole, in its order.

    Raises:
        UserError: The ratios are none, a class is too small, or a file is listed twice.
    """
    shares = _shares(ratios)
    if not len(index):
        raise UserError("the index lists no images; there is nothing to split")
    _require_single_files(index)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in shares]
    for name, members in zip(index.classes, index.members(), strict=True):
        sizes = _part_sizes(len(members), shares, name)
        by_path = sorted(members, key=lambda position: index.samples[position][0])
        shuffled = np.array(by_path)[class_random(seed, name).permutation(len(by_path))]
        for part, chosen in zip(parts, np.split(shuffled, np.cumsum(sizes)[:-1]), strict=True):
            part.append(chosen)
    return [index.subset(np.sort(np.concatenate(part)).tolist()) for part in parts]


def save_split(parts: Sequence[ImageIndex], folder: Path) -> list[Path]:
    """Write train_init.pt, val_init.pt and, for a third part, test_init.pt into a folder.

    Either all of them take their places or none does.

    Raises:
        SanctlError: A file cannot be written.
    """
    paths = [folder / f"{name}_init.pt" for name, _ in zip(PARTS, parts, strict=False)]
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_write(path)) for path in paths]
        for part, file in zip(parts, files, strict=True):
            write_index(part, file, folder)
    return paths


def class_random(seed: int, name: str) -> np.random.RandomState:
    """Return the generator of a class: a function of the seed and the class name.

    It is numpy's RandomState because that stream is promised never to change.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    words = np.frombuffer(digest, np.uint32).tolist()
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, *words])))


def _shares(ratios: Sequence[float]) -> list[float]:
    """Return the share of each part; they add up to 1."""
    given = ", ".join(f"{ratio:g}" for ratio in ratios)
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise UserError(f"ratio {given or '(none)'}: each must lie between 0 and 1, such as 0.8")
    rest = 1 - math.fsum(ratios)
    if rest < -_TOLERANCE:
        raise UserError(f"ratios {given} add up to more than 1; make them smaller")
    shares = [*ratios, rest] if rest > _TOLERANCE else list(ratios)
    if len(shares) > len(PARTS):
        raise UserError(
            f"ratios {given} make {len(shares)} parts; at most {len(PARTS)} have a name: "
            f"{', '.join(PARTS)}"
        )
    return shares


def _part_sizes(count: int, shares: list[float], name: str) -> list[int]:
    """Return how many of a class's images each part gets, within one of `count` times its share.

    Every part starts from the whole images of its share, or from one. What is left goes to the
    parts that lack most, and what is too much comes from those that have most above their share.
    """
    exact = [count * share for share in shares]
    sizes = [max(1, math.floor(size + _TOLERANCE)) for size in exact]

    def lacking(part: int) -> float:
        return exact[part] - sizes[part]

    while sum(sizes) < count:
        sizes[max(range(len(sizes)), key=lacking)] += 1
    while sum(sizes) > count:
        able = [part for part, size in enumerate(sizes) if size > 1]
        if not able:
            break
        sizes[min(able, key=lacking)] -= 1
    if sum(sizes) != count or any(
        abs(lacking(part)) > 1 + _TOLERANCE for part in range(len(sizes))
    ):
        raise UserError(
            f"class {name} has {count} {'image' if count == 1 else 'images'}, too few for "
            f"{len(shares)} parts of these ratios; add images, leave the class out, or choose "
            "larger shares"
        )
    return sizes


def _require_single_files(index: ImageIndex) -> None:
    """Raise if a file is listed twice: its copies could fall into two parts."""
    keys = index.file_keys()
    if len(set(keys)) == len(keys):
        return
    seen: dict[str, int] = {}
    for position, key in enumerate(keys):
        first = seen.setdefault(key, position)
        if first != position:
            (path, target), (other, other_target) = index.samples[position], index.samples[first]
            where = (
                f"in class {index.classes[target]}"
                if target == other_target
                else f"in classes {index.classes[other_target]} and {index.classes[target]}"
            )
            also = f" (also as {other})" if other != path else ""
            raise UserError(
                f"{path} is listed twice {where}{also}; it could fall into two parts: "
                "index the folder again, or remove one"
            )
