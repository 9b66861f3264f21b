"""What kernels that go through (N, H, W, C) tensors by channels share: which they take, grids."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import WARP

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# As in channels.cuh.
THREADS = 256
JOINED = 4
# What a thread reads at once of 16-bit values.
MOST_CHANNELS = 8
# Several for each multiprocessor of the largest GPUs; what they sum up is to be joined.
SUMMING_BLOCKS = 1024
# Pixels or windows of a thread that has nothing to sum up.
TURNS = 8
PIXELS = 2**31


@dataclass(frozen=True)
class Deal:
    """How pixels or windows are dealt out; from shapes only, so that sums repeat.

    Attributes:
        lanes: groups of channels that a block has, a power of two.
        slabs: blocks that share a pixel.
        parts: blocks that share the channels of a slab.
    """

    lanes: int
    slabs: int
    parts: int

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.slabs * self.parts


def deal(count: int, groups: int, sums: bool) -> Deal:
    """Deal out `count` pixels or windows of `groups` groups of channels."""
    lanes = math.gcd(groups, WARP)
    slabs = groups // lanes
    parts = -(-count * lanes // (THREADS * TURNS))
    return Deal(lanes, slabs, min(parts, -(-SUMMING_BLOCKS // slabs)) if sums else parts)


def bytes_of_sums(sums: int, itemsize: int) -> int:
    """Return the shared memory for so many sums of every thread of a block."""
    return sums * THREADS * itemsize


def obstacle(dtype: torch.dtype, channels: int, what: str) -> str | None:
    """Return why no kernels take such tensors, or None if they do."""
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the kernels of {what} take float16, bfloat16 and float32, not {name}"
    if channels % MOST_CHANNELS != 0:
        return f"the kernels of {what} take multiples of {MOST_CHANNELS} channels, not {channels}"
    return None


def fits(images: Tensor) -> bool:
    """Tell whether the kernels, which count pixels in 32 bits, take so many."""
    return images.numel() // images.shape[1] < PIXELS


def by_pixels(x: Tensor, vector: int) -> Tensor:
    """Return x in channels_last, where `vector` channels may be read at once."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % (vector * x.itemsize) == 0 else x.clone()
