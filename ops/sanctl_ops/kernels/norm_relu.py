"""Launches of norm_relu.cu; `weight`, `bias`, statistics and tables are float32."""

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels.channels import THREADS, by_pixels, bytes_of_sums, deal
from sanctl_ops.kernels.norm_statistics import SUMS, close, partials_of, statistics, vector_of
from sanctl_ops.kernels.runtime import kernel, launch

SOURCE = "norm_relu.cu"


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, every channel's mean and variance, and (2, C) factors and summands."""
    channels, vector = x.shape[1], vector_of(x)
    x = by_pixels(x, vector)
    mean, variance, table = statistics(x, norm)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    pixels = x.numel() // channels
    dealt = deal(pixels, channels // vector, sums=False)
    launch(
        kernel(SOURCE, "norm_relu", x.dtype, vector),
        x.device,
        dealt.blocks,
        THREADS,
        (x, table, out, np.uint32(pixels), channels, dealt.lanes, dealt.parts),
    )
    return out, mean, variance, table


def backward(
    grad: Tensor, x: Tensor, norm: Norm, table: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias.

    Args:
        grad: the gradient of the output.
        x: what was normalised.
        norm: the normalisation with the statistics of x.
        table: factors and summands of x.
        skip: what comes to x's gradient from elsewhere.
    """
    assert norm.mean is not None
    channels, vector = x.shape[1], vector_of(x)
    groups, pixels = channels // vector, x.numel() // channels
    grad, x = by_pixels(grad, vector), by_pixels(x, vector)
    dealt = deal(pixels, groups, sums=True)
    partials = partials_of(x, dealt.parts)
    launch(
        kernel(SOURCE, "norm_relu_sums", x.dtype, vector),
        x.device,
        dealt.blocks,
        THREADS,
        (
            *(grad, x, norm.mean, table, partials, np.uint32(pixels)),
            *(channels, dealt.lanes, dealt.parts),
        ),
        bytes_of_sums(SUMS * vector, norm.mean.itemsize),
    )
    grad_weight, grad_bias, shares = close(partials, dealt.parts, norm, pixels)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    dealt = deal(pixels, groups, sums=False)
    launch(
        kernel(SOURCE, "norm_relu_input_gradient", x.dtype, vector, skip is not None),
        x.device,
        dealt.blocks,
        THREADS,
        (
            *(grad, grad if skip is None else by_pixels(skip, vector), x, table, shares, grad_x),
            *(np.uint32(pixels), channels, dealt.lanes, dealt.parts),
        ),
    )
    return grad_x, grad_weight, grad_bias
