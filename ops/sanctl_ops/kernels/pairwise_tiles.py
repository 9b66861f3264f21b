"""How the kernels of pairwise attention cut planes into tiles (pairwise.cuh)."""

import itertools
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from sanctl_ops.kernels.geometry import DIVISOR, divisor, structure
from sanctl_ops.kernels.pairwise_layout import DTYPES, Layout
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES

# As struct Tiling in pairwise.cuh.
TILING = np.dtype(
    [(name, DIVISOR) for name in ("across", "down", "columns", "staged")]
    + [(name, np.int32) for name in ("rows", "height", "width")]
)

GROUP = 16  # pixels of a warp, as in pairwise.cuh
# Warps of a block, at most; those of a walk over relations of more than 16 channels; and products
# that tensor cores add up before a sum is written.
MOST_WARPS = 8
MANY_CHANNELS_WARPS = 4
MOST_PRODUCTS = 256
# Columns of a tile where groups of pixels take whole rows of it.
GROUP_COLUMNS = (16, 8, 4)
# As PARTS in pairwise_relation_gradient.cu, and what a block of it may take of shared memory where
# registers leave room for more than two.
GRADIENT_PARTS = {128: 2}
GRADIENT_BYTES = {32: 72 * 1024}
# Shares that sums over all pixels are dealt out to, at least, where there are tiles enough.
SHARES = 1024


@dataclass(frozen=True)
class Tiles:
    """A walk over planes, cut into tiles.

    Attributes:
        rows, columns: of a tile.
        down, across: tiles of an image.
        staged: columns of a tile and of what its windows reach.
        warps: of a block.
        shared_bytes: what a block stages: of a tile's pixels, and of those that its windows reach.
        argument: struct Tiling.
    """

    rows: int
    columns: int
    down: int
    across: int
    staged: int
    warps: int
    shared_bytes: int
    argument: np.ndarray

    @property
    def of_image(self) -> int:
        """Tiles of an image."""
        return self.down * self.across


def tiles_of_share(layout: Layout, cut: Tiles) -> int:
    """Return how many tiles a block takes whose sums run over all pixels."""
    groups = -(-cut.rows * cut.columns // (GROUP * cut.warps))
    most = max(1, MOST_PRODUCTS // (groups * layout.taps))
    return max(1, min(most, layout.images * cut.of_image // SHARES))


def relation_walk(layout: Layout) -> Tiles:
    """Return the tiles of a walk over relations."""
    return _known(_relation_walk(layout))


def gradient_walk(layout: Layout) -> Tiles:
    """Return the tiles of a walk over relations that adds up gradients of keys."""
    return _known(_gradient_walk(layout))


def value_walk(layout: Layout) -> Tiles:
    """Return the tiles of a walk over queries that stages values."""
    return _known(_value_walk(layout))


def slope_walk(layout: Layout) -> Tiles:
    """Return the tiles of a walk over padded keys that stages slopes and sums of powers."""
    return _known(_slope_walk(layout))


def obstacle(dtype: torch.dtype, layout: Layout) -> str | None:
    """Return why the kernels cannot take these tensors, or None if they can."""
    if dtype not in DTYPES:
        return f"there are kernels for float16 and bfloat16, not for {dtype}"
    reason = layout.obstacle()
    if reason is not None:
        return reason
    relations = _relation_walk(layout), _gradient_walk(layout)
    if None in (*relations, _value_walk(layout), _slope_walk(layout)):
        return f"windows of {layout.kernel_size} pixels do not fit shared memory"
    return None


def _known(cut: Tiles | None) -> Tiles:
    assert cut is not None, "such layouts are an obstacle"
    return cut


def _relation_walk(layout: Layout) -> Tiles | None:
    return _tiles(_one_image(layout), False, _relation_warps(layout), 2 * layout.size)


def _relation_warps(layout: Layout) -> int:
    return MANY_CHANNELS_WARPS if layout.rel > 16 else MOST_WARPS


def _gradient_walk(layout: Layout) -> Tiles | None:
    chunks = -(-layout.size // (8 * GRADIENT_PARTS.get(layout.rel, 1)))
    most_bytes = GRADIENT_BYTES.get(layout.rel, MOST_SHARED_BYTES)
    # A pixel's key, and the float sums of a part of its channels.
    bytes_of_pixel = 2 * layout.size + 32 * chunks
    return _row_tiles(_one_image(layout), _relation_warps(layout), bytes_of_pixel, most_bytes)


def _value_walk(layout: Layout) -> Tiles | None:
    return _tiles(_one_image(layout), False, MOST_WARPS, 2 * (8 * layout.blocks + 8))


def _slope_walk(layout: Layout) -> Tiles | None:
    bytes_of_pixel = 2 * (8 * layout.blocks + 8) + 4 * layout.slots
    return _tiles(_one_image(layout), True, MOST_WARPS, bytes_of_pixel)


def _one_image(layout: Layout) -> Layout:
    """Return what tiles depend on: the number of images may be symbolic."""
    return replace(layout, images=1)


@cache
def _tiles(layout: Layout, keys: bool, most_warps: int, bytes_of_pixel: int) -> Tiles | None:
    """Cut a walk over queries or padded keys into tiles that fit shared memory.

    Args:
        layout: the layer.
        keys: whether the walk is over padded keys.
        most_warps: of a block.
        bytes_of_pixel: what is staged of a pixel.

    Returns:
        Tiles of at most MOST_WARPS groups of pixels, or None if not even one row fits.
    """
    more = layout.kernel_size - 1
    height, width = layout.padded if keys else (layout.height, layout.width)
    most_pixels = MOST_WARPS * GROUP
    for across in range(-(-width // most_pixels), width + 1):
        columns = -(-width // across)
        staged = columns + more
        rows = min(height, most_pixels // columns)
        while rows > 1 and (rows + more) * staged * bytes_of_pixel > MOST_SHARED_BYTES:
            rows -= 1
        down = -(-height // rows)
        rows = -(-height // down)
        cut = _cut(layout, rows, columns, down, across, staged, bytes_of_pixel, most_warps)
        if cut.shared_bytes <= MOST_SHARED_BYTES:
            return cut
    return None


@cache
def _row_tiles(
    layout: Layout, most_warps: int, bytes_of_pixel: int, most_bytes: int
) -> Tiles | None:
    """Cut a walk over queries into tiles of which groups of pixels take whole rows.

    Args:
        layout: the layer.
        most_warps: of a block, which takes up to two turns.
        bytes_of_pixel: what is staged of a pixel.
        most_bytes: of shared memory.

    Returns:
        Of the tiles that fit those that keep the fewest warps busy, then stage the fewest pixels;
        None if none fit.
    """
    more, found = layout.kernel_size - 1, []
    for columns, turns in itertools.product(GROUP_COLUMNS, (2, 1)):
        across = -(-layout.width // columns)
        staged = (columns if across > 1 else layout.width) + more
        of_warps = most_warps * turns * GROUP // columns
        rows = min(layout.height, of_warps, most_bytes // (staged * bytes_of_pixel) - more)
        if rows > 0:
            down = -(-layout.height // rows)
            rows = -(-layout.height // down)
            cut = _cut(layout, rows, columns, down, across, staged, bytes_of_pixel, most_warps)
            groups = -(-rows * columns // GROUP)
            busy = cut.of_image * cut.warps * -(-groups // cut.warps)
            found.append((busy, cut.of_image * cut.shared_bytes, cut))
    return min(found, key=lambda one: one[:2])[2] if found else None


def _cut(
    layout: Layout,
    rows: int,
    columns: int,
    down: int,
    across: int,
    staged: int,
    bytes_of_pixel: int,
    most_warps: int,
) -> Tiles:
    """Return tiles of which `staged` columns are staged; their warps are equally busy."""
    shared_bytes = (rows + layout.kernel_size - 1) * staged * bytes_of_pixel
    fields = (divisor(across), divisor(down), divisor(columns), divisor(staged))
    argument = structure((*fields, rows, layout.height, layout.width), TILING)
    groups = -(-rows * columns // GROUP)
    warps = -(-groups // -(-groups // most_warps))
    return Tiles(rows, columns, down, across, staged, warps, shared_bytes, argument)
