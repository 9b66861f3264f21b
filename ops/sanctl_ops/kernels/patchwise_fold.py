"""Launches that bring patchwise attention's parameters to its kernels, and their gradients back."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.patchwise_plan import Sizes
from sanctl_ops.kernels.runtime import kernel, launch

SOURCE = "patchwise_fold.cu"
THREADS = 256
JOINED_COLUMNS = 32


class Known(NamedTuple):
    """A normalisation by known statistics, in float32, in the order that kernels take it."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


def blocks_for(items: int, threads: int = THREADS) -> int:
    """Return blocks with a thread for every item."""
    return -(-items // threads)


def fold_relation(sizes: Sizes, norm: Known, sharp: bool = False) -> tuple[Tensor, Tensor]:
    """Return the relation's factors, or its signs and thresholds, and its units for the kernels."""
    count = (sizes.taps + 1) * sizes.relation_tiles * plan.PIXELS
    affine = norm.weight.new_empty(2 * count, dtype=torch.float16)
    units = norm.weight.new_empty(4 * sizes.relation_tiles * plan.PIXELS)
    launch(
        kernel(SOURCE, "patchwise_fold_relation", torch.float32, sharp),
        affine.device,
        blocks_for(count),
        THREADS,
        (
            *norm,
            affine,
            units,
            sizes.relation,
            sizes.relation_tiles,
            sizes.taps,
        ),
    )
    return affine, units


def fold_first(sizes: Sizes, weight: Tensor) -> Tensor:
    """Return the first convolution as the kernels take it."""
    words = (sizes.taps + 1) * sizes.relation_tiles * sizes.hidden_tiles * WARP * 2
    fragments = weight.new_empty(2 * words, dtype=torch.float16)
    launch(
        kernel(SOURCE, "patchwise_fold_first", torch.float32),
        weight.device,
        blocks_for(words),
        THREADS,
        (
            weight,
            fragments,
            sizes.relation,
            sizes.relation_tiles,
            sizes.taps,
            sizes.hidden,
            sizes.hidden_tiles,
            words,
        ),
    )
    return fragments


def fold_second(
    sizes: Sizes, weight: Tensor, bias: Tensor, turned: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the second convolution, or its transpose, and its bias as the kernels take them."""
    words = sizes.hidden_tiles * sizes.taps * WARP * sizes.hidden_tiles
    fragments = weight.new_empty(2 * words, dtype=torch.float16)
    biases = weight.new_empty(sizes.hidden_tiles * sizes.taps * plan.CHANNELS)
    launch(
        kernel(SOURCE, "patchwise_fold_second", torch.float32, turned),
        weight.device,
        blocks_for(words),
        THREADS,
        (weight, bias, fragments, biases, sizes.taps, sizes.hidden, sizes.hidden_tiles, words),
    )
    return fragments, biases


def fold_first_turned(sizes: Sizes, weight: Tensor, norm: Known) -> Tensor:
    """Return the first convolution's transpose, times the relation's scale, for the kernels."""
    words = (sizes.taps + 1) * 2 * sizes.relation_tiles * WARP * sizes.hidden_tiles
    fragments = weight.new_empty(2 * words, dtype=torch.float16)
    launch(
        kernel(SOURCE, "patchwise_fold_first_turned", torch.float32),
        weight.device,
        blocks_for(words),
        THREADS,
        (
            weight,
            *norm,
            fragments,
            sizes.relation,
            sizes.relation_tiles,
            sizes.taps,
            sizes.hidden,
            sizes.hidden_tiles,
            words,
        ),
    )
    return fragments


def join(partials: Tensor, rows: int, sums: Tensor) -> None:
    """Add up rows of partial sums into `sums`, float64, in a fixed order."""
    threads = min(1024, max(THREADS, rows // 8 * WARP))
    launch(
        kernel(SOURCE, "patchwise_join", torch.float32),
        sums.device,
        -(-sums.numel() // JOINED_COLUMNS),
        threads,
        (partials, sums, rows, np.uint32(sums.numel())),
        threads * 8,
    )


def close_second(sizes: Sizes, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the second convolution's weight and bias."""
    outputs = sizes.hidden * sizes.taps
    weight = floats(sums, outputs, sizes.hidden)
    bias = floats(sums, outputs)
    launch(
        kernel(SOURCE, "patchwise_close_second", torch.float32),
        sums.device,
        blocks_for(weight.numel()),
        THREADS,
        (
            sums,
            weight,
            bias,
            sizes.taps,
            sizes.hidden,
            0 if sizes.narrow else sizes.hidden_tiles,
            weight.numel(),
        ),
    )
    return weight, bias


def close_first(
    sizes: Sizes, sums: Tensor, scales: Tensor, weight: Tensor, norm: Known, by_batch: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight1 and norm1, and what the statistics take back of images'."""
    grad_weight = torch.empty_like(weight)
    grad_norm, grad_bias = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    channels = norm.weight.numel()
    closing = torch.empty(2 * channels, dtype=torch.float64, device=sums.device)
    count = float(sizes.images * sizes.pixels if by_batch else 0)
    launch(
        kernel(SOURCE, "patchwise_close_first", torch.float32),
        sums.device,
        blocks_for(channels),
        THREADS,
        (
            sums,
            scales,
            weight,
            *norm,
            grad_weight,
            grad_norm,
            grad_bias,
            closing,
            sizes.relation,
            sizes.relation_tiles,
            sizes.taps,
            sizes.hidden,
            0 if sizes.narrow else sizes.hidden_tiles,
            count,
        ),
    )
    taken = weight.new_empty(2 * (sizes.pixels + 1) * sizes.relation)
    if by_batch:
        launch(
            kernel(SOURCE, "patchwise_spread", torch.float32, sizes.kernel_size),
            sums.device,
            blocks_for((sizes.pixels + 1) * sizes.relation),
            THREADS,
            (closing, taken, sizes.height, sizes.width, sizes.relation),
        )
    return grad_weight, grad_norm, grad_bias, taken


def floats(beside: Tensor, *shape: int) -> Tensor:
    """Return memory for float32 of this shape on a tensor's device."""
    return torch.empty(shape, dtype=torch.float32, device=beside.device)
