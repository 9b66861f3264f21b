"""Smaller datasets out of larger ones: some classes, some images, or what another lacks."""

from dataclasses import replace

import numpy as np

from sanctl.data.index import ImageIndex
from sanctl.data.split import class_random
from sanctl.errors import UserError

_CLASS_DRAW = "\0classes"  # no class folder can have this name


def sample_index(
    index: ImageIndex,
    *,
    seed: int = 0,
    classes: int | None = None,
    n: int | None = None,
    frac: float | None = None,
    exclude: ImageIndex | None = None,
) -> ImageIndex:
    """Take a part of a dataset.

    First the images of `exclude` are left out, then classes are drawn, then images of each. What
    is drawn depends on the seed and on the names and paths alone, not on their order. Classes
    without images are dropped, and the others numbered from 0 in their old order.

    Args:
        index: The whole.
        seed: Draws classes and images.
        classes: How many classes to keep.
        n: How many images of each class to keep.
        frac: Which share of each class to keep, above 0 and up to 1; at least one image.
        exclude: Leave out the images that this index lists.

    Raises:
        UserError: There are fewer classes, or fewer images in a class, than asked for; both `n`
            and `frac` are given; or no image is left.
    """
    if n is not None and frac is not None:
        raise UserError(
            "--n and --frac exclude each other: a number of images per class or a share"
        )
    if exclude is not None:
        index = without(index, exclude)
    if not len(index):
        raise UserError("no image is left; the other index lists them all")
    kept = np.flatnonzero(index.counts)
    if classes is not None:
        kept = _draw_classes(index, kept, classes, seed)
    members = index.members()
    positions = [
        position for target in kept for position in _draw(index, members[target], n, frac, seed)
    ]
    return _renumbered(index.subset(sorted(positions)), kept.tolist())


def without(index: ImageIndex, other: ImageIndex) -> ImageIndex:
    """Return an index without the files that another lists; it keeps its classes."""
    listed = set(other.file_keys())
    return index.subset(
        position for position, key in enumerate(index.file_keys()) if key not in listed
    )


def _draw_classes(index: ImageIndex, candidates: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    if not 1 <= wanted <= len(candidates):
        raise UserError(f"--classes {wanted}: choose 1 to {len(candidates)}, the classes there are")
    by_name = np.array(sorted(candidates, key=lambda target: index.classes[target]))
    drawn = class_random(seed, _CLASS_DRAW).permutation(len(by_name))[:wanted]
    return np.sort(by_name[drawn])


def _draw(
    index: ImageIndex, members: np.ndarray, n: int | None, frac: float | None, seed: int
) -> list[int]:
    """Return positions of the images to keep of one class."""
    if n is None and frac is None:
        return members.tolist()
    name = index.classes[index.samples[members[0]][1]]
    if n is not None and not 1 <= n <= len(members):
        limit = f"class {name} has {len(members)} images" if n > 0 else "at least 1"
        raise UserError(f"--n {n} images per class: {limit}; choose another number")
    if frac is not None and not 0 < frac <= 1:
        raise UserError(f"--frac {frac:g}: choose a share above 0 and up to 1, such as 0.1")
    wanted = n if n is not None else max(1, round(len(members) * (frac or 0)))
    by_path = sorted(members.tolist(), key=lambda position: index.samples[position][0])
    drawn = class_random(seed, name).permutation(len(by_path))[:wanted]
    return [by_path[choice] for choice in drawn]


def _renumbered(index: ImageIndex, kept: list[int]) -> ImageIndex:
    number = {old: new for new, old in enumerate(kept)}
    return replace(
        index,
        classes=[index.classes[old] for old in kept],
        samples=[(path, number[target]) for path, target in index.samples],
    )
