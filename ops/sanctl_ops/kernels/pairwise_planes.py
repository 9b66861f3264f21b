"""Launches of pairwise_fold.cu and pairwise_close.cu: what is computed of planes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels.geometry import divisor_argument, strides_argument
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


def _parts(layout: Layout) -> int:
    """Return the blocks that share the columns of an image."""
    return -(-layout.width // (THREADS // layout.relation))


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
    device, parts, relation = planes.query.device, _parts(layout), layout.relation
    moments = torch.empty(
        ((layout.images * relation + 2) * parts, MOMENTS), dtype=torch.float64, device=device
    )
    sizes = (layout.images, relation)
    launch(
        kernel(FOLD, "pairwise_moments", planes.query.dtype, layout.kernel_size),
        device,
        (layout.images + 1) * parts,
        THREADS,
        (*planes.arguments, moments, *sizes, layout.height, layout.width, parts),
        THREADS * 3 * 8,
    )
    running = mean is not None and variance is not None
    statistics = [torch.empty(relation + 2, device=device) for _ in range(2)]
    if mean is not None and variance is not None:
        statistics = [x.to(torch.float32, copy=True) for x in (mean, variance)]
    constants = torch.empty(relation + 2, 2, device=device)
    affine = torch.empty(2 * TAIL, dtype=torch.float16, device=device)
    launch(
        kernel(FOLD, "pairwise_join_moments", layout.rel, running),
        device,
        relation + 2,
        THREADS,
        (
            *(moments, wide(weight), wide(bias)),
            *(statistics[0], statistics[1], constants, affine, float(eps), float(layout.terms)),
            *(*sizes, parts),
        ),
        THREADS * 2 * 8,
    )
    shape = (2, layout.images, layout.plane, layout.size)
    folded = torch.empty(shape, dtype=torch.float16, device=device)
    launch(
        kernel(FOLD, "pairwise_fold_relation", planes.query.dtype, layout.rel),
        device,
        -(-folded[0].numel() // (8 * THREADS)),
        THREADS,
        (
            *(*planes.arguments, moments, constants, folded[0], folded[1]),
            *(divisor_argument(layout.width), divisor_argument(layout.height), *sizes, parts),
        ),
    )
    return folded, affine, statistics[0], statistics[1]


@dataclass(frozen=True)
class Closed:
    """Gradients of query, key, position, and of the first normalisation."""

    query: Tensor
    key: Tensor
    position: Tensor
    weight: Tensor
    bias: Tensor


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
    device, parts, relation = planes.query.device, _parts(layout), layout.relation
    mean, variance = wide(norm.mean), wide(norm.variance)
    base = layout.rel or relation
    positions = [x[..., base : base + 2].sum(0, dtype=torch.float64) for x in sums]
    slopes = (*sums, *positions)
    totals = torch.empty(
        (layout.images * relation + 2) * parts, 2, dtype=torch.float64, device=device
    )
    sizes = (layout.images, relation, layout.height, layout.width, parts, layout.size)
    dtype, blocks = planes.query.dtype, (layout.images + 1) * parts
    launch(
        kernel(CLOSE, "pairwise_close_sums", dtype),
        device,
        blocks,
        THREADS,
        (*planes.arguments, *slopes, mean, totals, *sizes),
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
    outputs = (
        *(grad_query, strides_argument(grad_query), grad_key, strides_argument(grad_key)),
        of_positions,
    )
    launch(
        kernel(CLOSE, "pairwise_close", dtype, layout.kernel_size),
        device,
        blocks,
        THREADS,
        (*planes.arguments, *slopes, mean, constants, *outputs, *sizes),
    )
    grad_position = of_positions.sum(0).view(planes.position.shape)
    return Closed(grad_query, grad_key, grad_position, grad_weight, grad_bias)
