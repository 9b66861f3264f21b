"""How the kernels of patchwise attention deal out their work, and which tensors they take."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels import halves
from sanctl_ops.kernels.geometry import SAME_KERNEL_SIZES, structure
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES

# As struct Shape in patchwise.cuh.
SHAPE = np.dtype(
    [
        (name, np.int32)
        for name in (
            *("images", "height", "width", "down", "across", "relation", "hidden", "share"),
            *("relation_tiles", "query_pitch", "key_pitch", "value_pitch", "grad_pitch"),
            *("relation_vector", "value_vector"),
        )
    ]
)
# As in patchwise.cuh.
PIXELS, CHANNELS, SHARE = 16, 8, 8
VALUES = CHANNELS * SHARE
# Channels that one access moves, at most.
VECTOR = 8
MOST_HIDDEN = 64
MOST_SIDE = 14
# A warp that makes one product at once instead of two has more of them to make in a block.
MOST_SIDE_OF_WIDEST = 10
MOST_RESIDENT = 4
# Warps that run at once on a multiprocessor with 128 registers a thread.
RESIDENT_WARPS = 16
# A float for every warp that a block may have.
MOST_BYTES = 32 * 4


@dataclass(frozen=True)
class Sizes:
    """What the layout of all work follows from.

    Attributes:
        images: N.
        height: H.
        width: W.
        relation: channels of query and key.
        hidden: Cw.
        share: value channels that share a weight.
        kernel_size: K.
    """

    images: int
    height: int
    width: int
    relation: int
    hidden: int
    share: int
    kernel_size: int

    @cached_property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.height * self.width

    @cached_property
    def taps(self) -> int:
        """Taps of a window."""
        return self.kernel_size**2

    @cached_property
    def relation_tiles(self) -> int:
        """Tiles of 16 relation channels, filled up to what a block takes at once."""
        each = self.relation_at_once // 2
        return -(-self.relation // (PIXELS * each)) * each

    @cached_property
    def relation_at_once(self) -> int:
        """AT_ONCE in patchwise_relation_gradient.cu: 8 relation channels each."""
        return min(2 * self.hidden_tiles, 4)

    @cached_property
    def hidden_tiles(self) -> int:
        """Tiles of 8 hidden channels: the template parameter WT, a power of two."""
        return 1 << (-(-self.hidden // CHANNELS) - 1).bit_length()

    @cached_property
    def narrow(self) -> bool:
        """Whether the kernels of patchwise_narrow*.cu serve."""
        return self.relation <= 4 and self.hidden <= 2 and self.kernel_size == 3

    @cached_property
    def hidden_width(self) -> int:
        """Hidden channels as halves, filled up for the kernels that take them."""
        return 2 if self.narrow else self.hidden_tiles * CHANNELS

    @cached_property
    def hidden_pitch(self) -> int:
        """Elements between pixels of staged hidden values, HIDDEN_PITCH in patchwise.cuh."""
        return CHANNELS if self.hidden_tiles == 1 else self.hidden_width + 8


# The same object again, so that what follows from it is worked out once.
sizes_of = lru_cache(maxsize=256)(Sizes)


@dataclass(frozen=True)
class Tiling:
    """Tiles of an image: so many down and across, of at most `rows` x `columns` pixels."""

    down: int
    across: int
    rows: int
    columns: int
    radius: int

    @cached_property
    def halo(self) -> int:
        """Pixels of a tile with those around it."""
        return (self.rows + 2 * self.radius) * (self.columns + 2 * self.radius)

    @cached_property
    def products(self) -> int:
        """Products of 16 pixels."""
        return -(-self.rows * self.columns // PIXELS)

    @cached_property
    def paired(self) -> "Tiling":
        """The same with rows filled up to an even number of pixels."""
        return replace(self, columns=self.columns + self.columns % 2)


Bytes = Callable[[Sizes, Tiling], int]


def bytes_of_hidden(sizes: Sizes, tiling: Tiling) -> int:
    """Return the shared memory of patchwise_hidden."""
    return tiling.halo * (sizes.relation_tiles * PIXELS + 8) * 2


def bytes_of_attend(sizes: Sizes, tiling: Tiling) -> int:
    """Return the shared memory of patchwise_attend."""
    return MOST_BYTES + tiling.paired.halo * VALUES * 2


def bytes_of_slopes(sizes: Sizes, tiling: Tiling) -> int:
    """Return the shared memory of patchwise_slopes."""
    pixels = tiling.paired.products * PIXELS
    slopes = sizes.kernel_size * pixels * CHANNELS
    return bytes_of_attend(sizes, tiling) + (slopes + pixels * sizes.hidden_pitch) * 2


def bytes_of_value_gradient(sizes: Sizes, tiling: Tiling) -> int:
    """Return the shared memory of patchwise_value_gradient."""
    return bytes_of_attend(sizes, tiling) + tiling.paired.halo * sizes.hidden_pitch * 2


def bytes_of_relation_gradient(sizes: Sizes, tiling: Tiling) -> int:
    """Return the shared memory of patchwise_relation_gradient."""
    # As in patchwise_folded.cuh.
    beside = tiling.radius * (tiling.radius + 1) // 2 + 1
    staged = (tiling.rows + 2 * beside) * (tiling.columns + 2 * beside)
    return staged * sizes.hidden_pitch * 2


def bytes_of_weight_gradient(sizes: Sizes, tiling: Tiling) -> int:
    """Return the shared memory of patchwise_weight_gradient."""
    pixels = tiling.products * PIXELS
    keys = tiling.rows * (tiling.columns + 2 * tiling.radius) * (PIXELS + 8)
    return (keys + pixels * sizes.hidden_pitch) * 2 + pixels * 4


@cache
def tiling(sizes: Sizes, needed: Bytes) -> Tiling | None:
    """Return the largest tiles that fit into shared memory, or None where none do."""
    radius = sizes.kernel_size // 2
    most = MOST_SIDE_OF_WIDEST if sizes.hidden_tiles == CHANNELS else MOST_SIDE
    for side in range(most, radius, -1):
        down, across = -(-sizes.height // side), -(-sizes.width // side)
        # What lies beyond a border mirrors pixels of the tile there.
        if min(sizes.height // down, sizes.width // across) <= radius:
            continue
        found = Tiling(down, across, -(-sizes.height // down), -(-sizes.width // across), radius)
        if needed(sizes, found) <= MOST_SHARED_BYTES:
            return found
    return None


def obstacle(
    dtype: torch.dtype, sizes: Sizes, needed: tuple[Bytes, ...] = (bytes_of_slopes, bytes_of_hidden)
) -> str | None:
    """Return why the kernels do not take such tensors, or None if they do."""
    return halves.obstacle(dtype, "patchwise attention") or _misfit(sizes, needed)


@lru_cache(maxsize=256)
def _misfit(sizes: Sizes, needed: tuple[Bytes, ...]) -> str | None:
    """Return why the kernels do not take such sizes, or None if they do."""
    if sizes.kernel_size not in SAME_KERNEL_SIZES:
        return f"the kernels of patchwise attention take 3, 5 and 7 taps, not {sizes.kernel_size}"
    if sizes.hidden > MOST_HIDDEN or sizes.share > SHARE:
        return (
            f"the kernels of patchwise attention take {MOST_HIDDEN} weight channels, shared by "
            f"{SHARE} value channels each, not {sizes.hidden} shared by {sizes.share}"
        )
    needed = (*needed, bytes_of_value_gradient)
    if sizes.images * sizes.pixels * sizes.hidden_width >= 2**31:
        return f"the kernels of patchwise attention do not take {sizes.images} such images at once"
    if any(tiling(sizes, one) is None for one in needed):
        return f"{sizes.relation} relation channels do not fit into shared memory"
    return None


def shape_argument(
    sizes: Sizes,
    tiles: Tiling,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    grad: Tensor | None = None,
    channels: int | None = None,
) -> np.ndarray:
    """Return struct Shape; the images that a kernel reads are as `by_pixels` returns them.

    `channels` of the values lie side by side where they are read, by default Cw.
    """
    pitches, starts = [0] * 4, [0] * 4
    for i, x in enumerate((query, key, value, grad)):
        if x is not None:
            pitches[i], starts[i] = x.stride(3), x.data_ptr() // x.itemsize % VECTOR
    return _shape(sizes, tiles, channels or sizes.hidden, *pitches, *starts)


@lru_cache(maxsize=1024)
def _shape(sizes: Sizes, tiles: Tiling, channels: int, *places: int) -> np.ndarray:
    """Return struct Shape of images that lie at `places`: four pitches, and four starts."""
    pitches, starts = places[:4], places[4:]
    sides = (sizes.images, sizes.height, sizes.width, tiles.down, tiles.across)
    numbers = (sizes.relation, sizes.hidden, sizes.share, sizes.relation_tiles)
    # Channels that one access may move; where there is no image, zeros are as good as aligned.
    relation = math.gcd(VECTOR, sizes.relation, *pitches[:2], *starts[:2])
    values = math.gcd(VECTOR, channels, *pitches[2:], *starts[2:])
    return structure((*sides, *numbers, *pitches, relation, values), SHAPE)


def by_pixels(x: Tensor) -> Tensor:
    """Return an image whose channels lie side by side, and whose pixels lie evenly apart."""
    images, _, height, width = x.shape
    image, channel, row, pitch = x.stride()
    if channel == 1 and row == width * pitch and (image == height * row or images == 1):
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def channels_last_like(x: Tensor) -> Tensor:
    """Return memory for another image like x, channels_last."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def shares_of(tasks: int, most: int) -> int:
    """Return among how many blocks, at most `most`, to deal out tasks evenly."""
    each = -(-tasks // max(1, min(most, tasks)))
    return -(-tasks // each)


@cache
def resident_blocks(device: torch.device, shared_bytes: int, warps: int) -> int:
    """Return about how many blocks run at once that need so much shared memory and registers."""
    by_memory = 2 * MOST_SHARED_BYTES // shared_bytes
    return multiprocessors(device) * max(1, min(MOST_RESIDENT, by_memory, RESIDENT_WARPS // warps))


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many there are; one where there is no GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
