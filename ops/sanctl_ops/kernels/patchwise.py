"""Launches of the CUDA kernels behind patchwise attention's forward pass."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels import patchwise_narrow as narrow
from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.patchwise_fold import (
    THREADS,
    Known,
    blocks_for,
    floats,
    fold_first,
    fold_relation,
    fold_second,
)
from sanctl_ops.kernels.patchwise_plan import Sizes
from sanctl_ops.kernels.runtime import kernel, launch

PLANES, STATISTICS = "patchwise_planes.cu", "patchwise_statistics.cu"
JOINING = 1024
# WIDE_THREADS in patchwise_statistics.cu for 3 x 3 taps.
WIDE_THREADS = 1024
# Blocks that add up plane-sized tensors.
BLOCKS = 264


@dataclass(frozen=True)
class Parameters:
    """The layer's parameters in float32, dense."""

    norm1: Norm
    weight1: Tensor
    norm2: Norm
    weight2: Tensor
    bias2: Tensor


def statistics(sizes: Sizes, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and variances of the relation's channels in float32."""
    elements = sizes.pixels * sizes.relation
    # Few, since every row of taps reads the sums of all.
    shares = plan.shares_of(sizes.images, -(-BLOCKS * THREADS // elements))
    threads = WIDE_THREADS if sizes.kernel_size == 3 else THREADS
    moments = [_image_moments(sizes, image, shares) for image in (query, key)]
    mean, variance = (
        floats(query, sizes.relation * (sizes.taps + 1)),
        floats(query, sizes.relation * (sizes.taps + 1)),
    )
    launch(
        kernel(STATISTICS, "patchwise_statistics", query.dtype, sizes.kernel_size),
        query.device,
        sizes.relation * (sizes.kernel_size + 1),
        threads,
        (
            *(query, key, *moments, mean, variance),
            *(sizes.images, sizes.height, sizes.width, sizes.relation, shares),
        ),
        2 * sizes.kernel_size * threads * 8,
    )
    return mean, variance


def _image_moments(sizes: Sizes, image: Tensor, shares: int) -> Tensor:
    """Return an image less its first pixel, and its squares, summed over shares of the images."""
    elements = sizes.pixels * sizes.relation
    moments = torch.empty(2 * shares * elements, dtype=torch.float64, device=image.device)
    launch(
        kernel(STATISTICS, "patchwise_image_moments", image.dtype),
        image.device,
        blocks_for(shares * elements),
        THREADS,
        (image, moments, sizes.images, sizes.pixels, sizes.relation, image.stride(3), shares),
    )
    return moments


def hidden_values(
    sizes: Sizes, query: Tensor, key: Tensor, affine: Tensor, units: Tensor, weight: Tensor
) -> Tensor:
    """Return what the first convolution makes of the relation, (N, H, W, Cw), float32."""
    hidden = affine.new_empty((sizes.images, sizes.pixels, sizes.hidden), dtype=torch.float32)
    if sizes.narrow:
        narrow.hidden_values(sizes, query, key, (units, affine, weight), hidden)
        return hidden
    first = fold_first(sizes, weight)
    tiling = plan.tiling(sizes, plan.bytes_of_hidden)
    assert tiling is not None
    launch(
        kernel("patchwise_hidden.cu", "patchwise_hidden", key.dtype, *template(sizes)),
        key.device,
        sizes.images * tiling.down * tiling.across,
        warps_together(sizes, tiling.products) * WARP,
        (
            query,
            key,
            units,
            affine,
            first,
            hidden,
            plan.shape_argument(sizes, tiling, query=query, key=key),
        ),
        plan.bytes_of_hidden(sizes, tiling),
    )
    return hidden


def template(sizes: Sizes) -> tuple[int, int]:
    """Return the template parameters K and WT."""
    return sizes.kernel_size, sizes.hidden_tiles


def rows_of_sums(sizes: Sizes) -> int:
    """Return how many blocks add up hidden values: each thread stays with one channel."""
    count = sizes.images * sizes.pixels * sizes.hidden
    blocks = min(BLOCKS, blocks_for(count))
    return blocks if THREADS % sizes.hidden == 0 else -(-blocks // sizes.hidden) * sizes.hidden


def hidden_statistics(sizes: Sizes, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each hidden channel."""
    rows = rows_of_sums(sizes)
    partials = torch.empty(rows * 2 * sizes.hidden, dtype=torch.float64, device=hidden.device)
    launch(
        kernel(PLANES, "patchwise_moments", torch.float32),
        hidden.device,
        rows,
        THREADS,
        (hidden, partials, sizes.hidden, np.uint32(hidden.numel()), np.uint32(rows * THREADS)),
        THREADS * 8,
    )
    mean, variance = hidden.new_empty(sizes.hidden), hidden.new_empty(sizes.hidden)
    launch(
        kernel(PLANES, "patchwise_join_moments", torch.float32),
        hidden.device,
        1,
        JOINING,
        (partials, mean, variance, sizes.hidden, rows, float(sizes.images * sizes.pixels)),
        JOINING * 8,
    )
    return mean, variance


def rectified(sizes: Sizes, hidden: Tensor, norm: Known) -> Tensor:
    """Return hidden values normalised and rectified, as halves, filled up to whole tiles."""
    pixels, width = sizes.images * sizes.pixels, sizes.hidden_width
    out = hidden.new_empty(pixels * width, dtype=torch.float16)
    pairs = pixels * width // 2
    blocks = min(blocks_for(pairs), 4 * BLOCKS)
    launch(
        kernel(PLANES, "patchwise_rectify", torch.float32),
        hidden.device,
        blocks,
        THREADS,
        (
            hidden,
            *norm,
            out,
            sizes.hidden,
            width,
            np.uint32(pairs),
            np.uint32(blocks * THREADS),
        ),
    )
    return out


def attend(sizes: Sizes, value: Tensor, rectified: Tensor, layer: Parameters) -> Tensor:
    """Return the weighed values, channels_last."""
    if sizes.narrow:
        return narrow.attend(sizes, value, rectified, layer.weight2, layer.bias2)
    second, biases = fold_second(sizes, layer.weight2, layer.bias2)
    out = plan.channels_last_like(value)
    tiling = plan.tiling(sizes, plan.bytes_of_attend)
    assert tiling is not None
    launch(
        kernel("patchwise_attend.cu", "patchwise_attend", value.dtype, *template(sizes)),
        value.device,
        sizes.images * tiling.down * tiling.across * sizes.hidden_tiles,
        warps_for(tiling.paired.products) * WARP,
        (value, rectified, second, biases, out, plan.shape_argument(sizes, tiling, value=value)),
        plan.bytes_of_attend(sizes, tiling),
    )
    return out


def warps_for(products: int) -> int:
    """Return warps of a block, at most 8, that have like many products each."""
    return plan.shares_of(products, THREADS // WARP)


def warps_together(sizes: Sizes, products: int) -> int:
    """Return warps of a block that make all products at once, TOGETHER in the sources for each."""
    together = 1 if sizes.hidden_tiles == plan.CHANNELS else 2
    return -(-products // together)


def forward(
    sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, layer: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, channels_last, the four statistics, and the hidden values."""
    query, key, value = (plan.by_pixels(x) for x in (query, key, value))
    norm1 = known(layer.norm1) or with_statistics(layer.norm1, *statistics(sizes, query, key))
    affine, units = fold_relation(sizes, norm1)
    hidden = hidden_values(sizes, query, key, affine, units, layer.weight1)
    norm2 = known(layer.norm2) or with_statistics(layer.norm2, *hidden_statistics(sizes, hidden))
    out = attend(sizes, value, rectified(sizes, hidden, norm2), layer)
    return out, *norm1[:2], *norm2[:2], hidden


def known(norm: Norm) -> Known | None:
    """Return a normalisation by running statistics as kernels take it, or None."""
    if norm.mean is None or norm.variance is None:
        return None
    return with_statistics(norm, norm.mean, norm.variance)


def with_statistics(norm: Norm, mean: Tensor, variance: Tensor) -> Known:
    """Return a normalisation by these statistics."""
    return Known(mean, variance, norm.weight, norm.bias, norm.eps)
