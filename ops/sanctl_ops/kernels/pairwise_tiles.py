"""How the kernels of pairwise attention cut planes into tiles (pairwise.cuh)."""

import itertools
import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from sanctl_ops.kernels import halves
from sanctl_ops.kernels.geometry import DIVISOR, divisor, structure
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES

# As struct Tiling in pairwise.cuh.
TILING = np.dtype(
    [(name, DIVISOR) for name in ("across", "down", "columns", "staged")]
    + [(name, np.int32) for name in ("rows", "height", "width")]
)

GROUP = 16  # pixels of a warp, as in pairwise.cuh
# Warps of a block, at most, and groups of pixels that each takes; warps where relations have more
# than 16 channels; and products that tensor cores add up before a sum is written.
MOST_WARPS = 8
MOST_TURNS = 2
MANY_CHANNELS_WARPS = 4
MOST_PRODUCTS = 256
# Columns of a tile where groups of pixels take whole rows of it.
GROUP_COLUMNS = (16, 8, 4)
# As PARTS in pairwise_relation_gradient.cu, and what a block of it may take of shared memory where
# registers leave room for more than two.
GRADIENT_PARTS = {128: 2}
GRADIENT_BYTES = {32: 72 * 1024}
# What staging a pixel takes, in taps of one.
STAGING = 5
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

    @cached_property
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
    return _known(_relation_walk(layout.of_one_image))


def gradient_walk(layout: Layout) -> Tiles:
    """Return the tiles of a walk over relations that adds up gradients of keys."""
    return _known(_gradient_walk(layout.of_one_image))


def value_walk(layout: Layout) -> Tiles:
    """Return the tiles of a walk over queries that stages values."""
    return _known(_value_walk(layout.of_one_image))


def slope_walk(layout: Layout) -> Tiles:
    """Return the tiles of a walk over padded keys that stages slopes and sums of powers."""
    return _known(_slope_walk(layout.of_one_image))


def obstacle(dtype: torch.dtype, layout: Layout) -> str | None:
    """Return why the kernels cannot take these tensors, or None if they can."""
    reason = halves.obstacle(dtype, "pairwise attention") or layout.obstacle
    if reason is not None:
        return reason
    one = layout.of_one_image
    if None in (_relation_walk(one), _gradient_walk(one), _value_walk(one), _slope_walk(one)):
        return f"windows of {layout.kernel_size} pixels do not fit shared memory"
    return None


def _known(cut: Tiles | None) -> Tiles:
    assert cut is not None, "such layouts are an obstacle"
    return cut


# Of one image: tiles do not depend on their number, which may be symbolic.
@cache
def _relation_walk(layout: Layout) -> Tiles | None:
    return _tiles(layout, *_warps_and_turns(layout), 2 * layout.size)


def _warps_and_turns(layout: Layout) -> tuple[int, int]:
    """Return the warps of a block that walks over relations, and their turns, at most.

    Small blocks fill what many channels take of registers leaves room for.
    """
    return (MANY_CHANNELS_WARPS, 1) if layout.rel > 16 else (MOST_WARPS, MOST_TURNS)


@cache
def _gradient_walk(layout: Layout) -> Tiles | None:
    chunks = -(-layout.size // (8 * GRADIENT_PARTS.get(layout.rel, 1)))
    most_bytes = GRADIENT_BYTES.get(layout.rel, MOST_SHARED_BYTES)
    # A pixel's key, and the float sums of a part of its channels.
    bytes_of_pixel = 2 * layout.size + 32 * chunks
    sizes = (*_warps_and_turns(layout), bytes_of_pixel)
    return _tiles(layout, *sizes, whole_rows=True, most_bytes=most_bytes)


@cache
def _value_walk(layout: Layout) -> Tiles | None:
    return _sums_walk(layout, 0, keys=False)


@cache
def _slope_walk(layout: Layout) -> Tiles | None:
    return _sums_walk(layout, 4 * layout.slots, keys=True)


def _sums_walk(layout: Layout, more_bytes: int, *, keys: bool) -> Tiles | None:
    """Return the tiles of a walk that stages values or slopes, and rows of logits."""
    bytes_of_pixel = 2 * (8 * layout.blocks + 8) + more_bytes
    bytes_of_warp = layout.kernel_size * GROUP * 16
    sizes = (MOST_WARPS, MOST_TURNS, bytes_of_pixel)
    return _tiles(layout, *sizes, bytes_of_warp=bytes_of_warp, keys=keys)


def _tiles(
    layout: Layout,
    most_warps: int,
    most_turns: int,
    bytes_of_pixel: int,
    *,
    bytes_of_warp: int = 0,
    keys: bool = False,
    whole_rows: bool = False,
    most_bytes: int = MOST_SHARED_BYTES,
) -> Tiles | None:
    """Cut a walk over planes into tiles.

    Args:
        layout: the layer.
        most_warps: of a block.
        most_turns: groups of pixels that a warp takes.
        bytes_of_pixel: what is staged of a pixel.
        bytes_of_warp: what a warp needs besides.
        keys: whether the walk is over padded keys, else over queries.
        whole_rows: whether groups of pixels take whole rows of a tile.
        most_bytes: of shared memory.

    Returns:
        Of the tiles that fit those that take the least work; None if none fit.
    """
    more, best, least = layout.kernel_size - 1, None, math.inf
    height, width = layout.padded if keys else (layout.height, layout.width)
    every_width = (-(-width // across) for across in range(1, width + 1))
    for columns, turns in itertools.product(
        GROUP_COLUMNS if whole_rows else dict.fromkeys(every_width), range(1, most_turns + 1)
    ):
        across = -(-width // columns)
        staged = min(columns, width) + more if across == 1 else columns + more
        for_pixels = most_bytes - most_warps * bytes_of_warp
        fitting = for_pixels // (staged * bytes_of_pixel) - more
        rows = min(height, most_warps * turns * GROUP // columns, fitting)
        if rows < 1:
            continue
        down = -(-height // rows)
        rows = -(-height // down)
        groups = -(-rows * columns // GROUP)
        warps = -(-groups // -(-groups // most_warps))
        pixels = (rows + more) * staged
        work = warps * -(-groups // warps) * GROUP * layout.taps + STAGING * pixels
        if down * across * work < least:
            least = down * across * work
            fields = (divisor(across), divisor(down), divisor(columns), divisor(staged))
            argument = structure((*fields, rows, layout.height, layout.width), TILING)
            sizes = (rows, columns, down, across, staged, warps)
            shared_bytes = pixels * bytes_of_pixel + warps * bytes_of_warp
            best = Tiles(*sizes, shared_bytes, argument)
    return best
