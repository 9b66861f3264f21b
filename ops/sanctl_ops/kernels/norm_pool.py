"""Launches of norm_pool.cu; `weight`, `bias`, statistics and tables are float32."""

import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels.channels import THREADS, by_pixels, bytes_of_sums, deal
from sanctl_ops.kernels.norm_statistics import SUMS, close, partials_of, statistics, vector_of
from sanctl_ops.kernels.pooling import pool_argument, pooled_like
from sanctl_ops.kernels.runtime import kernel, launch

SOURCE = "norm_pool.cu"


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, every channel's mean and variance, and (2, C) factors and summands."""
    channels, vector = x.shape[1], vector_of(x)
    x = by_pixels(x, vector)
    mean, variance, table, out = *statistics(x, norm), pooled_like(x, channels)
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
    channels, vector = x.shape[1], vector_of(x)
    groups = channels // vector
    grad, x = by_pixels(grad, vector), by_pixels(x, vector)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    dealt = deal(grad.numel() // channels, groups, sums=True)
    partials = partials_of(x, dealt.parts)
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
    grad_weight, grad_bias, shares = close(
        partials, dealt.parts, norm, x.numel() // channels if by_batch else 0
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


def _planes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]
