"""Launches of patchwise attention's kernels for one or two weight channels and 3 x 3 taps."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.patchwise_fold import floats, join
from sanctl_ops.kernels.patchwise_plan import Sizes, Tiling
from sanctl_ops.kernels.runtime import kernel, launch

SOURCE, SLOPES_SOURCE = "patchwise_narrow.cu", "patchwise_narrow_slopes.cu"
RELATION_SOURCE = "patchwise_narrow_relation.cu"
# A thread has two pixels.
MOST_ROWS, MOST_COLUMNS = 16, 32
# Blocks of patchwise_weight_gradient_narrow that a multiprocessor holds.
RESIDENT = 3
# What a block keeps beside images, and the halves of a pixel.
SHARED_FLOATS, STAGED = 96, 16
# Sums of a tap for the second convolution, and for the first one.
TERMS, SUMS = 6, 16
# Bytes of a tap's factors and weights, and of a staged key.
TAP_BYTES, KEY_BYTES = 48, 8


def attend(sizes: Sizes, value: Tensor, rectified: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    """Return the weighed values, channels_last."""
    tiling, out = _tiling(sizes), plan.channels_last_like(value)
    launch(
        kernel(SOURCE, "patchwise_attend_narrow", value.dtype),
        value.device,
        sizes.images * tiling.down * tiling.across,
        _threads(tiling),
        (value, rectified, second, bias, out, _shape(sizes, tiling, value=value)),
        _bytes(tiling),
    )
    return out


def value_gradient(
    sizes: Sizes, grad: Tensor, rectified: Tensor, second: Tensor, bias: Tensor
) -> Tensor:
    """Return the gradient of the values, channels_last."""
    tiling, out = _tiling(sizes), plan.channels_last_like(grad)
    launch(
        kernel(SOURCE, "patchwise_value_gradient_narrow", grad.dtype),
        grad.device,
        sizes.images * tiling.down * tiling.across,
        _threads(tiling),
        (grad, rectified, second, bias, out, _shape(sizes, tiling, grad=grad)),
        _bytes(tiling),
    )
    return out


def slopes(
    sizes: Sizes, grad: Tensor, value: Tensor, rectified: Tensor, second: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rectified values' gradients, and sums for the second convolution's."""
    tiling = _tiling(sizes)
    threads = _threads(tiling)
    blocks = plan.shares_of(
        sizes.images * tiling.down * tiling.across,
        plan.resident_blocks(grad.device, _bytes(tiling), threads // WARP),
    )
    gradients = floats(grad, sizes.images * sizes.pixels * sizes.hidden)
    rows = blocks * threads // WARP
    sums = torch.empty(sizes.taps * TERMS, dtype=torch.float64, device=grad.device)
    partials = floats(grad, rows * sums.numel())
    launch(
        kernel(SLOPES_SOURCE, "patchwise_slopes_narrow", grad.dtype),
        grad.device,
        blocks,
        threads,
        (
            *(grad, value, rectified, second, bias, gradients, partials),
            _shape(sizes, tiling, value=value, grad=grad),
            blocks,
        ),
        _bytes(tiling),
    )
    join(partials, rows, sums)
    return gradients, sums


def hidden_values(
    sizes: Sizes,
    query: Tensor,
    key: Tensor,
    layer: tuple[Tensor, Tensor, Tensor],
    hidden: Tensor,
) -> None:
    """Write what the first convolution makes; `layer` is units, factors and its weights."""
    tiling = _tiling(sizes)
    shape = plan.shape_argument(sizes, tiling, query=query, key=key)
    launch(
        kernel(RELATION_SOURCE, "patchwise_hidden_narrow", key.dtype),
        key.device,
        sizes.images * tiling.down * tiling.across,
        _threads(tiling),
        (query, key, *layer, hidden, shape),
        (sizes.taps + 1) * TAP_BYTES + tiling.halo * KEY_BYTES,
    )


def image_gradients(
    sizes: Sizes, query: Tensor, key: Tensor, factors: tuple[Tensor, ...], by_batch: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and key; see `patchwise_relations.image_gradients`."""
    tiling = _tiling(sizes)
    out_query, out = plan.channels_last_like(query), plan.channels_last_like(key)
    shape = plan.shape_argument(sizes, tiling, query=query, key=key)
    launch(
        kernel(RELATION_SOURCE, "patchwise_relation_gradient_narrow", key.dtype),
        key.device,
        sizes.images * tiling.down * tiling.across,
        _threads(tiling),
        (query, key, *factors, out_query, out, shape, int(by_batch)),
        (sizes.taps + 1) * TAP_BYTES + tiling.halo * 4,
    )
    return out_query, out


def first_sums(
    sizes: Sizes, query: Tensor, key: Tensor, units: Tensor, affine: Tensor, gradient: Tensor
) -> Tensor:
    """Return what `close_first` takes."""
    tiling = _tiling(sizes)
    # A block has one row of taps, or the query.
    parts = sizes.kernel_size + 1
    blocks = plan.shares_of(
        sizes.images * tiling.down * tiling.across,
        plan.multiprocessors(key.device) * RESIDENT // parts,
    )
    threads = _threads(tiling)
    rows = blocks * threads // WARP
    sums = torch.empty((sizes.taps + 1) * SUMS, dtype=torch.float64, device=key.device)
    partials = floats(key, rows * sums.numel())
    shape = plan.shape_argument(sizes, tiling, query=query, key=key)
    launch(
        kernel(RELATION_SOURCE, "patchwise_weight_gradient_narrow", key.dtype),
        key.device,
        blocks * parts,
        threads,
        (query, key, units, affine, gradient, partials, shape, blocks),
        tiling.halo * KEY_BYTES,
    )
    join(partials, rows, sums)
    return sums


@cache
def _tiling(sizes: Sizes) -> Tiling:
    down, across = -(-sizes.height // MOST_ROWS), -(-sizes.width // MOST_COLUMNS)
    rows, columns = -(-sizes.height // down), -(-sizes.width // across)
    return Tiling(down, across, rows, columns, sizes.kernel_size // 2)


def _threads(tiling: Tiling) -> int:
    pairs = tiling.rows * tiling.paired.columns // 2
    return -(-pairs // WARP) * WARP


def _bytes(tiling: Tiling) -> int:
    """Return shared memory for values and for hidden ones, which one of the kernels stages."""
    return SHARED_FLOATS * 4 + tiling.paired.halo * (STAGED * 2 + 4)


def _shape(
    sizes: Sizes, tiling: Tiling, value: Tensor | None = None, grad: Tensor | None = None
) -> np.ndarray:
    """Return struct Shape; one access moves 8 channels where a pixel is two such accesses."""
    whole = sizes.hidden * sizes.share == STAGED
    return plan.shape_argument(
        sizes, tiling, value=value, grad=grad, channels=STAGED if whole else 1
    )
