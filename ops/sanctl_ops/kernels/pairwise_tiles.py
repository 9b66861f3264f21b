"""How the kernels of pairwise attention cut planes into tiles (pairwise.cuh)."""

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
# Shares that sums over all pixels are dealt out to, at least, where there are tiles enough.
SHARES = 1024


@dataclass(frozen=True)
class Tiles:
    """A walk over planes, cut into tiles.

    Attributes:
        rows, columns: of a tile.
        down, across: tiles of an image.
        warps: of a block.
        shared_bytes: what a block stages: of a tile's pixels, and of those that its windows reach.
        argument: struct Tiling.
    """

    rows: int
    columns: int
    down: int
    across: int
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


def relation_walk(layout: Layout, keys: bool = False) -> Tiles:
    """Return the tiles of a walk over the relations of queries or of padded keys."""
    return _known(_relation_walk(layout, keys))


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
    relations = (_relation_walk(layout, keys) for keys in (False, True))
    if None in (*relations, _value_walk(layout), _slope_walk(layout)):
        return f"windows of {layout.kernel_size} pixels do not fit shared memory"
    return None


def _known(cut: Tiles | None) -> Tiles:
    assert cut is not None, "such layouts are an obstacle"
    return cut


def _relation_walk(layout: Layout, keys: bool) -> Tiles | None:
    most_warps = MANY_CHANNELS_WARPS if layout.rel > 16 else MOST_WARPS
    return _tiles(_one_image(layout), keys, most_warps, 2 * layout.size)


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
        rows = min(height, most_pixels // columns)
        while rows > 1 and (rows + more) * (columns + more) * bytes_of_pixel > MOST_SHARED_BYTES:
            rows -= 1
        down = -(-height // rows)
        rows = -(-height // down)
        shared_bytes = (rows + more) * (columns + more) * bytes_of_pixel
        if shared_bytes <= MOST_SHARED_BYTES:
            fields = (divisor(across), divisor(down), divisor(columns), divisor(columns + more))
            sides = (rows, layout.height, layout.width)
            argument = structure((*fields, *sides), TILING)
            groups = -(-rows * columns // GROUP)
            warps = -(-groups // -(-groups // most_warps))
            return Tiles(rows, columns, down, across, warps, shared_bytes, argument)
    return None
