"""Launches of pairwise_fold.cu and pairwise_close.cu: what is computed of planes."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels.geometry import (
    DIVISOR,
    divisor,
    divisor_argument,
    strides_argument,
    structure,
)
from sanctl_ops.kernels.pairwise_layout import TAIL, Layout
from sanctl_ops.kernels.pairwise_saved import Planes
from sanctl_ops.kernels.pairwise_weights import wide
from sanctl_ops.kernels.runtime import kernel, launch
from sanctl_ops.window import empty_planes

FOLD = "pairwise_fold.cu"
CLOSE = "pairwise_close.cu"
# As in pairwise_planes.cuh and pairwise_fold.cu: threads of a block, and doubles of struct Moments.
THREADS = 256
MOMENTS = 5
# Of a thread that sums up moments: its columns, as in pairwise_fold.cu, and its rows, at most.
MOMENT_COLUMNS = 4
BAND = 32
# Pixels that a thread folds.
FOLDED_PIXELS = 8
# Pixels of a block that sums up over images.
SUMMED_PIXELS = 8
# As struct Cut in pairwise_close.cu; the channels of a block, at most, and what it may take of
# shared memory, so that four fit a multiprocessor.
CUT = np.dtype(
    [(name, DIVISOR) for name in ("down", "across", "pieces")]
    + [(name, np.int32) for name in ("rows", "columns", "channels")]
)
CLOSE_CHANNELS = 32
CLOSE_BYTES = 52 * 1024


def _parts(layout: Layout, items: int) -> int:
    """Return the blocks that share what is to be done for each channel of an image."""
    return -(-items // (THREADS // layout.relation))


def _moments(planes: Planes, layout: Layout) -> tuple[Tensor, int]:
    """Return sums over the relation by image, channel and part of an image, and how many parts."""
    device, sizes = planes.query.device, (layout.images, layout.relation)
    bands = -(-layout.height // BAND)
    parts = _parts(layout, -(-layout.width // MOMENT_COLUMNS) * bands)
    moments = torch.empty(
        ((layout.images * layout.relation + 2) * parts, MOMENTS), dtype=torch.float64, device=device
    )
    launch(
        kernel(FOLD, "pairwise_moments", planes.query.dtype, layout.kernel_size),
        device,
        (layout.images + 1) * parts,
        THREADS,
        (*planes.arguments, moments, *sizes, layout.height, layout.width, bands, parts),
        THREADS * 3 * 8,
    )
    return moments, parts


def fold(
    planes: Planes,
    layout: Layout,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the folded planes, their affine tail, and the mean and variance that they go by."""
    device, relation = planes.query.device, layout.relation
    moments, parts = _moments(planes, layout)
    running = mean is not None and variance is not None
    statistics = [torch.empty(relation + 2, device=device) for _ in range(2)]
    if mean is not None and variance is not None:
        statistics = [x.to(torch.float32, copy=True) for x in (mean, variance)]
    constants = torch.empty(relation + 2, 2, device=device)
    centres = torch.empty(layout.images, relation, device=device)
    affine = torch.empty(2 * TAIL, dtype=torch.float16, device=device)
    launch(
        kernel(FOLD, "pairwise_join_moments", layout.rel, running),
        device,
        relation + 2,
        THREADS,
        (
            *(moments, wide(weight), wide(bias)),
            *(statistics[0], statistics[1], constants, centres, affine),
            *(float(eps), float(layout.terms), layout.plane, layout.images, relation, parts),
        ),
        THREADS * 2 * 8,
    )
    folded = torch.empty(layout.folded_shape, dtype=torch.float16, device=device)
    pixels_at_once = THREADS // (layout.size // 8)
    shares = -(-layout.plane // (pixels_at_once * FOLDED_PIXELS))
    rows = all(_is_in_rows(x) for x in planes.countable[:2])
    launch(
        kernel(FOLD, "pairwise_fold_relation", planes.query.dtype, layout.rel),
        device,
        layout.images * shares,
        THREADS,
        (
            *(*planes.arguments, constants, centres, folded[0], folded[1]),
            *(divisor_argument(layout.width), layout.plane, relation, shares, int(rows)),
        ),
    )
    return folded, affine, statistics[0], statistics[1]


def _is_in_rows(x: Tensor) -> bool:
    """Tell whether every 8 channels of a pixel are neighbours in memory, aligned for one access."""
    n, c, h, w = x.stride()
    return c == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in (n, h, w))


@dataclass(frozen=True)
class Cut:
    """How the last pass is cut: pixels and channels of a block, and blocks of an image."""

    rows: int
    columns: int
    channels: int
    down: int
    across: int
    pieces: int
    shared_bytes: int

    @cached_property
    def of_image(self) -> int:
        """Blocks of an image."""
        return self.down * self.across * self.pieces

    @cached_property
    def argument(self) -> np.ndarray:
        """Return struct Cut."""
        blocks = map(divisor, (self.down, self.across, self.pieces))
        return structure((*blocks, self.rows, self.columns, self.channels), CUT)


@cache
def _cut(height: int, width: int, relation: int, kernel_size: int) -> Cut:
    """Cut planes so that sums along rows fit shared memory, of whole columns if they do."""
    pieces = -(-relation // CLOSE_CHANNELS)
    channels = max(2, -(-relation // pieces))
    fitting = min(THREADS, CLOSE_BYTES // (8 * height)) // channels
    across = -(-width // max(1, fitting))
    columns = -(-width // across)
    of_row = 8 * channels * columns
    rows = height
    if rows * of_row > CLOSE_BYTES:
        rows = CLOSE_BYTES // of_row - (kernel_size - 1)
    down = -(-height // rows)
    rows = -(-height // down)
    staged = min(height, rows + kernel_size - 1)
    return Cut(rows, columns, channels, down, across, pieces, staged * of_row)


@dataclass(frozen=True)
class Closed:
    """Gradients of query, key, position, and of the first normalisation."""

    query: Tensor
    key: Tensor
    position: Tensor
    weight: Tensor
    bias: Tensor


def _position_sums(sums: tuple[Tensor, Tensor], layout: Layout) -> list[Tensor]:
    """Return the slopes of the positions, summed up over the images, (H * W, 2) and in float64."""
    device = sums[0].device
    found = [torch.empty(layout.plane, 2, dtype=torch.float64, device=device) for _ in sums]
    launch(
        kernel(CLOSE, "pairwise_sum_positions", torch.float32),
        device,
        2 * -(-layout.plane // SUMMED_PIXELS),
        THREADS,
        (*sums, *found, layout.images, layout.plane, layout.size, layout.rel or layout.relation),
        THREADS * 2 * 8,
    )
    return found


def close(
    planes: Planes, layout: Layout, sums: tuple[Tensor, Tensor], norm: Norm, by_batch: bool
) -> Closed:
    """Close the backward pass of the first normalisation.

    Args:
        planes: query, key and position.
        layout: the layer.
        sums: what `relation_sums` returns.
        norm: the first normalisation with the statistics that it went by.
        by_batch: whether these are the batch's.
    """
    assert norm.mean is not None
    assert norm.variance is not None
    device, relation = planes.query.device, layout.relation
    parts = _parts(layout, layout.width)
    mean, variance = wide(norm.mean), wide(norm.variance)
    slopes = (*sums, *_position_sums(sums, layout))
    totals = torch.empty(
        (layout.images * relation + 2) * parts, 2, dtype=torch.float64, device=device
    )
    sizes = (layout.images, relation, layout.height, layout.width)
    dtype = planes.query.dtype
    launch(
        kernel(CLOSE, "pairwise_close_sums", dtype),
        device,
        (layout.images + 1) * parts,
        THREADS,
        (*planes.arguments, *slopes, mean, totals, *sizes, parts, layout.size),
        THREADS * 2 * 8,
    )
    grad_weight, grad_bias = (torch.empty(relation + 2, device=device) for _ in range(2))
    constants = torch.empty(relation + 2, 3, device=device)
    launch(
        kernel(CLOSE, "pairwise_join_close", by_batch),
        device,
        relation + 2,
        THREADS,
        (
            *(totals, wide(norm.weight), mean, variance, grad_weight, grad_bias),
            *(constants, float(norm.eps), float(layout.terms), layout.images, relation, parts),
        ),
        THREADS * 2 * 8,
    )
    grad_query, grad_key = (empty_planes(x) for x in (planes.query, planes.key))
    of_positions = torch.empty(2, 2, layout.plane, device=device)
    cut = _cut(layout.height, layout.width, relation, layout.kernel_size)
    outputs = (
        *(grad_query, strides_argument(grad_query), grad_key, strides_argument(grad_key)),
        of_positions,
    )
    launch(
        kernel(CLOSE, "pairwise_close", dtype, layout.kernel_size),
        device,
        (layout.images + 1) * cut.of_image,
        THREADS,
        (*planes.arguments, *slopes, mean, constants, *outputs, *sizes, layout.size, cut.argument),
        cut.shared_bytes,
    )
    grad_position = of_positions.sum(0).view(planes.position.shape)
    return Closed(grad_query, grad_key, grad_position, grad_weight, grad_bias)
