"""Launches of norm_statistics.cu; `weight`, `bias`, statistics and tables are float32."""

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels.channels import JOINED, THREADS, bytes_of_sums, deal
from sanctl_ops.kernels.geometry import VECTOR_BYTES
from sanctl_ops.kernels.runtime import kernel, launch

SOURCE = "norm_statistics.cu"
# Of every channel: what a pass sums up.
SUMS = 2


def statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and (2, C) factors and summands of x.

    The first two are new also where they are given. x is as `by_pixels` returns it.
    """
    channels, vector = x.shape[1], vector_of(x)
    pixels = x.numel() // channels
    dealt = deal(pixels, channels // vector, sums=True)
    parts = dealt.parts if norm.mean is None else 0
    partials = partials_of(x, parts)
    if norm.mean is None or norm.variance is None:
        mean, variance = (torch.empty_like(norm.weight) for _ in range(2))
        launch(
            kernel(SOURCE, "norm_moments", x.dtype, vector),
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
        kernel(SOURCE, "norm_fold", x.dtype),
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


def close(partials: Tensor, parts: int, norm: Norm, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight and bias, and (2, C) factors and summands of x in its own.

    Args:
        partials: sums of the slopes times x - mean, and of the slopes, of each of the parts.
        parts: how many there are.
        norm: with what was normalised by.
        count: values of a channel that the statistics are of; 0 where they were given.
    """
    assert norm.mean is not None
    assert norm.variance is not None
    channels = norm.weight.shape[0]
    grad_weight, grad_bias = (torch.empty_like(norm.weight) for _ in range(2))
    shares = norm.weight.new_empty(2, channels)
    launch(
        kernel(SOURCE, "norm_close", torch.float32),
        partials.device,
        channels // JOINED,
        THREADS,
        (
            *(partials, norm.mean, norm.variance, norm.weight, grad_weight, grad_bias, shares),
            *(norm.eps, float(count), channels, parts),
        ),
        bytes_of_sums(SUMS, partials.itemsize),
    )
    return grad_weight, grad_bias, shares


def vector_of(x: Tensor) -> int:
    """Return how many channels a thread has: all sums of a pass fit into shared memory."""
    return VECTOR_BYTES // x.itemsize


def partials_of(x: Tensor, parts: int) -> Tensor:
    """Return memory for the sums of a pass, (parts, SUMS, C)."""
    return torch.empty(parts * SUMS * x.shape[1], dtype=torch.float64, device=x.device)
