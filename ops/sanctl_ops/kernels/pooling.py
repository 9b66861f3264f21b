"""What the kernels of pooling.cuh have in common: structures and results."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import DIVISOR, divisor, structure

# As struct Pool in pooling.cuh.
POOL = np.dtype(
    [(name, DIVISOR) for name in ("across", "down")]
    + [(name, np.int32) for name in ("height", "width")]
    + [("windows", np.uint32)]
)


@cache
def pool_argument(images: int, height: int, width: int, partial: bool = False) -> np.ndarray:
    """Return struct Pool; with `partial`, of windows that reach beyond odd sides, too."""
    down, across = ((side + partial) // 2 for side in (height, width))
    return structure((divisor(across), divisor(down), height, width, images * down * across), POOL)


def pooled_like(x: Tensor, channels: int) -> Tensor:
    """Return a new (N, channels, H // 2, W // 2) tensor in channels_last."""
    shape = (x.shape[0], channels, x.shape[2] // 2, x.shape[3] // 2)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
