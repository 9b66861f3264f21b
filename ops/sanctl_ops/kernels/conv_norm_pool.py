"""Launches of conv_norm_pool.cu; the weight is (Cout, Cin), and all parameters are float32."""

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels import channels as by_channels
from sanctl_ops.kernels.channels import JOINED, THREADS, by_pixels, bytes_of_sums, deal
from sanctl_ops.kernels.pooling import pool_argument, pooled_like
from sanctl_ops.kernels.runtime import kernel, launch

SOURCE = "conv_norm_pool.cu"
# As in conv_norm_pool.cu.
VECTOR = 8
MOST_IMAGE_CHANNELS = 4
MOST_CHANNELS = 256
# Of the image's moments, which one block joins.
MOMENT_BLOCKS = 512
DOUBLE = 8


def obstacle(dtype: torch.dtype, image_channels: int, channels: int) -> str | None:
    """Return why the kernels do not take such images and weights, or None if they do."""
    if image_channels > MOST_IMAGE_CHANNELS or channels > MOST_CHANNELS:
        return (
            f"the kernels of conv_norm_pool make up to {MOST_CHANNELS} channels of up to "
            f"{MOST_IMAGE_CHANNELS}, not {channels} of {image_channels}"
        )
    return by_channels.obstacle(dtype, channels, "conv_norm_pool")


def forward(
    images: Tensor, weight: Tensor, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, each channel's mean and variance, and what the gradient needs of them.

    The last two are (Cin + 1, Cin), float64: a point near the images' mean and the covariance,
    zeros if the statistics are given; and (Cin + 1, Cout): what pixels relative to that point are
    multiplied by, and what is added then.
    """
    channels, image_channels = weight.shape
    images = by_pixels(images, 1)
    mean, variance, moments, table = _statistics(images, weight, norm)
    out = pooled_like(images, channels)
    dealt = deal(out.numel() // channels, channels // VECTOR, sums=False)
    launch(
        kernel(SOURCE, "conv_norm_pool", images.dtype, image_channels),
        images.device,
        dealt.blocks,
        THREADS,
        (
            *(images, moments, table, out, _pool(images)),
            *(channels, dealt.lanes, dealt.parts),
        ),
    )
    return out, mean, variance, moments, table


def backward(
    grad: Tensor, images: Tensor, weight: Tensor, norm: Norm, moments: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the three parameters; `norm` has what was normalised by."""
    assert norm.mean is not None
    assert norm.variance is not None
    channels, image_channels = weight.shape
    grad, images = by_pixels(grad, VECTOR), by_pixels(images, 1)
    dealt = deal(grad.numel() // channels, channels // VECTOR, sums=True)
    sums = image_channels + 1
    partials = moments.new_empty(dealt.parts * sums * channels)
    launch(
        kernel(SOURCE, "conv_norm_pool_sums", images.dtype, image_channels),
        images.device,
        dealt.blocks,
        THREADS,
        (
            *(grad, images, moments, table, partials, _pool(images)),
            *(channels, dealt.lanes, dealt.parts),
        ),
        bytes_of_sums(sums * VECTOR, table.itemsize),
    )
    gradients = tuple(torch.empty_like(p) for p in (weight, norm.weight, norm.bias))
    launch(
        kernel(SOURCE, "conv_norm_pool_close", images.dtype, image_channels),
        images.device,
        channels // JOINED,
        THREADS,
        (
            *(partials, weight, norm.weight, norm.mean, norm.variance, moments, *gradients),
            *(norm.eps, channels, dealt.parts),
        ),
        bytes_of_sums(sums, DOUBLE),
    )
    grad_weight, grad_norm, grad_bias = gradients
    return grad_weight, grad_norm, grad_bias


def _statistics(
    images: Tensor, weight: Tensor, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, variance, moments and table; the first two are new also where they are given."""
    channels, image_channels = weight.shape
    pixels = images.numel() // image_channels
    sums = image_channels * (image_channels + 3) // 2
    moments = images.new_empty(image_channels + 1, image_channels, dtype=torch.float64)
    if norm.mean is None or norm.variance is None:
        parts = min(MOMENT_BLOCKS, -(-pixels // THREADS))
        partials = moments.new_empty(parts * sums)
        mean, variance = (torch.empty_like(norm.weight) for _ in range(2))
        launch(
            kernel(SOURCE, "conv_norm_pool_moments", images.dtype, image_channels),
            images.device,
            parts,
            THREADS,
            (images, partials, np.uint32(pixels), np.uint32(parts * THREADS)),
            bytes_of_sums(sums, DOUBLE),
        )
    else:
        parts, partials = 0, moments.new_empty(0)
        mean, variance = norm.mean.clone(), norm.variance.clone()
    table = weight.new_empty(image_channels + 1, channels)
    launch(
        kernel(SOURCE, "conv_norm_pool_fold", images.dtype, image_channels),
        images.device,
        1,
        THREADS,
        (
            *(images, partials, weight, norm.weight, norm.bias, mean, variance, moments, table),
            *(norm.eps, float(pixels), channels, parts),
        ),
        bytes_of_sums(sums, DOUBLE),
    )
    return mean, variance, moments, table


def _pool(images: Tensor) -> np.ndarray:
    return pool_argument(images.shape[0], images.shape[2], images.shape[3])
