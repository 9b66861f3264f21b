"""How the kernels of pairwise attention cut up planes, and how they read weights (pairwise.cuh)."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from sanctl_ops.kernels.geometry import DIVISOR, divisor, structure

# As struct Tiling in pairwise.cuh.
TILING = np.dtype(
    [(name, DIVISOR) for name in ("across", "down", "columns", "staged")]
    + [(name, np.int32) for name in ("rows", "height", "width")]
)

# As in pairwise.cuh.
GROUP = 16
TAIL = 8
# Channels of the relation that there are kernels for, beside those within the tail.
RELATIONS = (0, 16, 32, 64, 128)
IN_TAIL = TAIL - 3
# Weight channels of which one lane's pair may repeat, and channels in one piece for a slab.
SLOTS = (2, 4, 8)
BLOCKS = (2, 4, 8)
KERNEL_SIZES = (3, 5, 7)
DTYPES = (torch.float16, torch.bfloat16)

# Warps of a block, at most; those of a walk over relations of more than 16 channels; and products
# that tensor cores add up before a sum is written.
MOST_WARPS = 8
MANY_CHANNELS_WARPS = 4
MOST_PRODUCTS = 256
# Shares that sums over all pixels are dealt out to, at least, where there are tiles enough.
SHARES = 1024


@dataclass(frozen=True)
class Layout:
    """Shapes of a layer, and what the kernels make of them.

    Attributes:
        images, height, width: of the planes.
        relation: channels of query and key.
        weights: weight channels, Cw.
        channels: channels of the values.
        kernel_size: K.
    """

    images: int
    height: int
    width: int
    relation: int
    weights: int
    channels: int
    kernel_size: int

    @property
    def rel(self) -> int:
        """Channels of the relation before the tail, padded; 0 if all are within it."""
        if self.relation <= IN_TAIL:
            return 0
        return next(r for r in RELATIONS if r >= self.relation)

    @property
    def size(self) -> int:
        """Channels of the folded planes."""
        return self.rel + TAIL

    @property
    def hidden(self) -> int:
        """Channels between the convolutions, padded."""
        return max(self.rel, 8)

    @property
    def hidden_rows(self) -> int:
        """Rows of weights by hidden channels, whole blocks of 16."""
        return max(self.hidden, 16)

    @property
    def slabs(self) -> int:
        """Blocks of weight channels."""
        return max(1, self.rel // 16)

    @property
    def slots(self) -> int:
        """Weight channels of a slab."""
        return min(self.weights, 8)

    @property
    def blocks(self) -> int:
        """Blocks of 8 channels of values that share a slab."""
        return self.channels // (8 * self.slabs)

    @property
    def step(self) -> int:
        """Channels between the blocks of a slab."""
        return self.weights if self.slots == 8 else 8

    @property
    def plane(self) -> int:
        """Pixels of a plane."""
        return self.height * self.width

    @property
    def padded(self) -> tuple[int, int]:
        """Sides of the padded planes."""
        more = self.kernel_size - 1
        return self.height + more, self.width + more

    @property
    def taps(self) -> int:
        """Taps of a window."""
        return self.kernel_size**2

    @property
    def terms(self) -> int:
        """Relations of a channel: what the statistics are taken over."""
        return self.images * self.plane * self.taps

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """Shape of the stored logits."""
        return self.images, self.slabs, self.taps, self.plane, self.slots

    def obstacle(self) -> str | None:
        """Return why there are no kernels for these shapes, or None."""
        if self.kernel_size not in KERNEL_SIZES:
            return f"a kernel_size of {self.kernel_size} is none of 3, 5 and 7"
        if self.relation > RELATIONS[-1]:
            return f"{self.relation} channels of query and key are more than {RELATIONS[-1]}"
        if self.slots not in SLOTS or self.weights != self.slots * self.slabs:
            return f"{self.weights} weight channels do not go with {self.relation} of the relation"
        shared = self.channels // self.weights
        if self.channels % 8 != 0 or self.blocks not in BLOCKS:
            return f"{shared} channels that share a weight do not make 2, 4 or 8 blocks"
        if self._is_large():
            return "the planes are too large"
        return None

    def _is_large(self) -> bool:
        """Tell whether 32 bits count too little: elements of an image, or vectors of all."""
        relation, values = math.prod(self.padded) * self.size, self.plane * self.channels
        of_image = max(relation, values, math.prod(self.logits_shape[1:]))
        return of_image >= 2**31 or self.images * max(relation, values) >= 2**34


@dataclass(frozen=True)
class Tiles:
    """A walk over planes, cut into tiles.

    Attributes:
        rows, columns: of a tile.
        down, across: tiles of an image.
        staged: pixels of a tile and of what its windows reach.
        warps: of a block.
        argument: struct Tiling.
    """

    rows: int
    columns: int
    down: int
    across: int
    staged: int
    warps: int
    argument: np.ndarray

    @property
    def of_image(self) -> int:
        """Tiles of an image."""
        return self.down * self.across


@cache
def tiles(
    layout: Layout, keys: bool, most_warps: int, bytes_of_pixel: int, most_bytes: int
) -> Tiles | None:
    """Cut a walk over queries or padded keys into tiles that fit shared memory.

    Args:
        layout: the layer.
        keys: whether the walk is over padded keys.
        most_warps: of a block.
        bytes_of_pixel: what is staged of a pixel.
        most_bytes: shared memory.

    Returns:
        Tiles of at most MOST_WARPS groups of pixels, or None if not even one row fits.
    """
    more = layout.kernel_size - 1
    height, width = layout.padded if keys else (layout.height, layout.width)
    most_pixels = MOST_WARPS * GROUP
    for across in range(-(-width // most_pixels), width + 1):
        columns = -(-width // across)
        rows = min(height, most_pixels // columns)
        while rows > 1 and (rows + more) * (columns + more) * bytes_of_pixel > most_bytes:
            rows -= 1
        down = -(-height // rows)
        rows = -(-height // down)
        staged = (rows + more) * (columns + more)
        if staged * bytes_of_pixel <= most_bytes:
            fields = (divisor(across), divisor(down), divisor(columns), divisor(columns + more))
            sides = (rows, layout.height, layout.width)
            argument = structure((*fields, *sides), TILING)
            groups = -(-rows * columns // GROUP)
            warps = -(-groups // -(-groups // most_warps))
            return Tiles(rows, columns, down, across, staged, warps, argument)
    return None


def tiles_of_share(layout: Layout, cut: Tiles) -> int:
    """Return how many tiles a block takes whose sums run over all pixels."""
    groups = -(-cut.rows * cut.columns // (GROUP * cut.warps))
    most = max(1, MOST_PRODUCTS // (groups * layout.taps))
    return max(1, min(most, layout.images * cut.of_image // SHARES))
