"""Launches of norm_pool.cu; `weight`, `bias`, statistics and tables are float32."""

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels.geometry import VECTOR_BYTES
from sanctl_ops.kernels.pooling import (
    JOINED,
    THREADS,
    by_pixels,
    bytes_of_sums,
    deal,
    pool_argument,
    pooled_like,
)
from sanctl_ops.kernels.runtime import kernel, launch

SOURCE = "norm_pool.cu"
# Of every channel: what a pass sums up.
SUMS = 2


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, every channel's mean and variance, and (2, C) factors and summands."""
    channels, vector = x.shape[1], _vector(x)
    x = by_pixels(x, vector)
    mean, variance, table, out = *_statistics(x, norm, vector), pooled_like(x, channels)
    windows = out.numel() // channels
    dealt = deal(windows, channels // vector, sums=False)
    launch(
        kernel(SOURCE, "norm_pool", x.dtype, vector),
        x.device,
        dealt.blocks,
        THREADS,
        (x, table, out, pool_argument(*_planes(x)), channels, dealt.lanes, dealt.parts),
    )
    return out, mean, variance, table


def backward(
    grad: Tensor, x: Tensor, norm: Norm, table: Tensor, by_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; `norm` has what x was normalised by."""
    assert norm.mean is not None
    assert norm.variance is not None
    channels, vector = x.shape[1], _vector(x)
    groups = channels // vector
    grad, x = by_pixels(grad, vector), by_pixels(x, vector)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    dealt = deal(grad.numel() // channels, groups, sums=True)
    partials = _partials(x, dealt.parts)
    launch(
        kernel(SOURCE, "norm_pool_sums", x.dtype, vector),
        x.device,
        dealt.blocks,
        THREADS,
        (
            *(grad, x, norm.mean, table, partials, pool_argument(*_planes(x))),
            *(channels, dealt.lanes, dealt.parts),
        ),
        bytes_of_sums(SUMS * vector, norm.mean.itemsize),
    )
    grad_weight, grad_bias = (torch.empty_like(norm.weight) for _ in range(2))
    shares = torch.empty_like(table)
    count = float(x.numel() // channels if by_batch else 0)
    launch(
        kernel(SOURCE, "norm_pool_close", torch.float32),
        x.device,
        channels // JOINED,
        THREADS,
        (
            *(partials, norm.mean, norm.variance, norm.weight, grad_weight, grad_bias, shares),
            *(norm.eps, count, channels, dealt.parts),
        ),
        bytes_of_sums(SUMS, partials.itemsize),
    )
    pool = pool_argument(*_planes(x), partial=True)
    images, height, width = _planes(x)
    dealt = deal(images * -(-height // 2) * -(-width // 2), groups, sums=False)
    launch(
        kernel(SOURCE, "norm_pool_input_gradient", x.dtype, vector),
        x.device,
        dealt.blocks,
        THREADS,
        (grad, x, table, shares, grad_x, pool, channels, dealt.lanes, dealt.parts),
    )
    return grad_x, grad_weight, grad_bias


def _statistics(x: Tensor, norm: Norm, vector: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and table; the first two are new also where they are given."""
    channels = x.shape[1]
    pixels = x.numel() // channels
    dealt = deal(pixels, channels // vector, sums=True)
    parts = dealt.parts if norm.mean is None else 0
    partials = _partials(x, parts)
    if norm.mean is None or norm.variance is None:
        mean, variance = (torch.empty_like(norm.weight) for _ in range(2))
        launch(
            kernel(SOURCE, "norm_pool_moments", x.dtype, vector),
            x.device,
            dealt.blocks,
            THREADS,
            (x, partials, np.uint32(pixels), channels, dealt.lanes, parts),
            bytes_of_sums(SUMS * vector, partials.itemsize),
        )
    else:
        mean, variance = norm.mean.clone(), norm.variance.clone()
    table = norm.weight.new_empty(2, channels)
    launch(
        kernel(SOURCE, "norm_pool_fold", x.dtype),
        x.device,
        channels // JOINED,
        THREADS,
        (
            *(x, partials, norm.weight, norm.bias, mean, variance, table),
            *(norm.eps, float(pixels), channels, parts),
        ),
        bytes_of_sums(SUMS, partials.itemsize),
    )
    return mean, variance, table


def _vector(x: Tensor) -> int:
    """Return how many channels a thread has: all sums of a pass fit into shared memory."""
    return VECTOR_BYTES // x.itemsize


def _partials(x: Tensor, parts: int) -> Tensor:
    return torch.empty(parts * SUMS * x.shape[1], dtype=torch.float64, device=x.device)


def _planes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]
