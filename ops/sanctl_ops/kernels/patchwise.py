"""Launches of the CUDA kernels behind patchwise attention's forward pass."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.patchwise_plan import Sizes
from sanctl_ops.kernels.runtime import kernel, launch
from sanctl_ops.relation_statistics import window_statistics

FOLD, PLANES = "patchwise_fold.cu", "patchwise_planes.cu"
THREADS = 256
JOINING = 1024
JOINED_COLUMNS = 32
# Blocks that add up plane-sized tensors.
BLOCKS = 264


@dataclass(frozen=True)
class Parameters:
    """The layer's parameters in float32, dense, with known statistics."""

    norm1: Norm
    weight1: Tensor
    norm2: Norm
    weight2: Tensor
    bias2: Tensor


def blocks_for(items: int, threads: int = THREADS) -> int:
    """Return blocks with a thread for every item."""
    return -(-items // threads)


def statistics(sizes: Sizes, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and variances of the relation's channels in float32."""
    of_query = _image_moments(sizes, query).sum(1) / (sizes.images * sizes.pixels)
    of_key = _image_moments(sizes, key).unflatten(1, (sizes.height, sizes.width)).movedim(3, 1)
    pivots = [x[0, :, 0, 0].double() for x in (query, key)]
    means, variances = window_statistics(of_key, pivots[1], sizes.kernel_size, sizes.images)
    mean, square = of_query
    variance = (square - mean.square()).clamp_min(0)
    return (
        torch.cat((mean + pivots[0], means)).float(),
        torch.cat((variance, variances)).float(),
    )


def _image_moments(sizes: Sizes, image: Tensor) -> Tensor:
    """Return sums over images of an image less its first pixel, and of squares, (2, HW, rel)."""
    elements = sizes.pixels * sizes.relation
    shares = plan.shares_of(sizes.images, -(-BLOCKS * JOINING // elements))
    partials = torch.empty(
        (shares, 2, sizes.pixels, sizes.relation), dtype=torch.float64, device=image.device
    )
    launch(
        kernel(PLANES, "patchwise_image_moments", image.dtype),
        image.device,
        blocks_for(shares * elements),
        THREADS,
        (image, partials, sizes.images, sizes.pixels, sizes.relation, image.stride(3), shares),
    )
    return partials.sum(0)


def fold_relation(sizes: Sizes, norm: Norm, sharp: bool = False) -> tuple[Tensor, Tensor]:
    """Return the relation's factors, or its signs and thresholds, and its units for the kernels."""
    count = (sizes.taps + 1) * sizes.relation_tiles * plan.PIXELS
    affine = norm.weight.new_empty(2 * count, dtype=torch.float16)
    units = norm.weight.new_empty(4 * sizes.relation_tiles * plan.PIXELS)
    launch(
        kernel(FOLD, "patchwise_fold_relation", torch.float32, sharp),
        affine.device,
        blocks_for(count),
        THREADS,
        (
            norm.mean,
            norm.variance,
            norm.weight,
            norm.bias,
            norm.eps,
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
        kernel(FOLD, "patchwise_fold_first", torch.float32),
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
        kernel(FOLD, "patchwise_fold_second", torch.float32, turned),
        weight.device,
        blocks_for(words),
        THREADS,
        (weight, bias, fragments, biases, sizes.taps, sizes.hidden, sizes.hidden_tiles, words),
    )
    return fragments, biases


def hidden_values(
    sizes: Sizes, query: Tensor, key: Tensor, affine: Tensor, units: Tensor, first: Tensor
) -> Tensor:
    """Return what the first convolution makes of the relation, (N, H, W, Cw), float32."""
    tiling = plan.tiling(sizes, plan.bytes_of_hidden)
    assert tiling is not None
    hidden = affine.new_empty(
        (sizes.images, sizes.height, sizes.width, sizes.hidden), dtype=torch.float32
    )
    together = 1 if sizes.hidden_tiles == plan.CHANNELS else 2
    launch(
        kernel("patchwise_hidden.cu", "patchwise_hidden", key.dtype, *template(sizes)),
        key.device,
        sizes.images * tiling.down * tiling.across,
        -(-tiling.products // together) * WARP,
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


def rectified(sizes: Sizes, hidden: Tensor, norm: Norm) -> Tensor:
    """Return hidden values normalised and rectified, as halves, filled up to whole tiles."""
    pixels, width = sizes.images * sizes.pixels, sizes.hidden_width
    out = hidden.new_empty(pixels * width, dtype=torch.float16)
    pairs = pixels * width // 2
    launch(
        kernel(PLANES, "patchwise_rectify", torch.float32),
        hidden.device,
        blocks_for(pairs),
        THREADS,
        (
            hidden,
            norm.mean,
            norm.variance,
            norm.weight,
            norm.bias,
            norm.eps,
            out,
            sizes.hidden,
            width,
            np.uint32(pairs),
        ),
    )
    return out


def attend(
    sizes: Sizes, value: Tensor, rectified: Tensor, second: Tensor, biases: Tensor, out: Tensor
) -> None:
    """Write the weighed values; `out` is channels_last."""
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


def warps_for(products: int) -> int:
    """Return warps of a block, at most 8, that have like many products each."""
    return plan.shares_of(products, THREADS // WARP)


def forward(
    sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, layer: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, channels_last, the four statistics, and the hidden values."""
    query, key, value = (plan.by_pixels(x) for x in (query, key, value))
    norm1, norm2 = layer.norm1, layer.norm2
    if norm1.mean is None:
        mean, variance = statistics(sizes, query, key)
        norm1 = norm1._replace(mean=mean, variance=variance)
    affine, units = fold_relation(sizes, norm1)
    hidden = hidden_values(sizes, query, key, affine, units, fold_first(sizes, layer.weight1))
    if norm2.mean is None:
        mean, variance = hidden_statistics(sizes, hidden)
        norm2 = norm2._replace(mean=mean, variance=variance)
    out = torch.empty(
        value.shape, dtype=value.dtype, device=value.device, memory_format=torch.channels_last
    )
    second = fold_second(sizes, layer.weight2, layer.bias2)
    attend(sizes, value, rectified(sizes, hidden, norm2), *second, out)
    assert norm1.mean is not None
    assert norm1.variance is not None
    assert norm2.mean is not None
    assert norm2.variance is not None
    return out, norm1.mean, norm1.variance, norm2.mean, norm2.variance, hidden
