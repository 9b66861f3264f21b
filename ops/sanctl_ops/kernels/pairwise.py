"""Pairwise attention by kernels: which follow which, forward and backward."""

import torch
from torch import Tensor

from sanctl_ops import pairwise_formulas as formulas
from sanctl_ops.attention import Norm
from sanctl_ops.kernels import (
    pairwise_planes,
    pairwise_relation,
    pairwise_sums,
    pairwise_weights,
)
from sanctl_ops.kernels.pairwise_layout import TAIL, Layout
from sanctl_ops.kernels.pairwise_saved import Planes, Saved, empty_packed
from sanctl_ops.window import plane_format


def forward(
    planes: Planes,
    value: Tensor,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    layout: Layout,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Saved]:
    """Return the output, the four statistics, and what the backward pass takes."""
    folded, affine, mean1, variance1 = pairwise_planes.fold(planes, layout, *norm1)
    by_batch = norm2.mean is None
    sums = pairwise_weights.gram(folded, affine, layout) if by_batch else None
    packed, gram, mean2, variance2 = pairwise_weights.pack(sums, weight1, weight2, norm2, layout)
    logits, log_sums = pairwise_relation.weigh(folded, affine, packed, layout)
    rows = pairwise_sums.pixels_of(value)
    most_value = pairwise_sums.largest(rows)
    saved = Saved(gram, folded, affine, packed, logits, log_sums, most_value)
    out = _planes(pairwise_sums.aggregate(rows, saved, layout), value)
    return out, (mean1, variance1, mean2, variance2), saved


def empty_saved(query: Tensor, layout: Layout) -> Saved:
    """Return what `forward` saves, its values left open."""
    half, side = torch.float16, layout.relation + 3
    return Saved(
        query.new_empty(side, side, dtype=torch.float64),
        query.new_empty(layout.folded_shape, dtype=half),
        query.new_empty(2 * TAIL, dtype=half),
        empty_packed(query, layout),
        query.new_empty(layout.logits_shape, dtype=half),
        query.new_empty(layout.sums_shape, dtype=torch.float32),
        query.new_empty(1, dtype=torch.float32),
    )


def backward(
    grad: Tensor,
    planes: Planes,
    value: Tensor,
    out: Tensor,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    by_batch: tuple[bool, bool],
    saved: Saved,
    layout: Layout,
) -> formulas.Gradients:
    """Return the gradients; the norms hold the statistics that the forward pass went by."""
    grad, out = pairwise_sums.rows_of(grad), pairwise_sums.rows_of(out)
    value_rows = pairwise_sums.pixels_of(value)
    most_slope = pairwise_sums.largest(grad)
    # The padded gradient of the values is gone before that of the logits comes.
    grad_value = _planes(pairwise_sums.value_gradient(grad, saved, most_slope, layout), value)
    grad_logits = pairwise_sums.logits_gradient(grad, value_rows, out, saved, most_slope, layout)
    sums = pairwise_weights.weight_sums(saved, grad_logits, layout)
    closing = pairwise_weights.close2(sums, saved, most_slope, weight1, norm2, by_batch[1], layout)
    slopes = pairwise_relation.relation_sums(saved, grad_logits, closing, layout)
    del grad_logits
    closed = pairwise_planes.close(planes, layout, slopes, norm1, by_batch[0])
    return formulas.Gradients(
        closed.query,
        closed.key,
        grad_value,
        closed.position,
        (closed.weight, closed.bias),
        closing.weight1,
        (closing.weight, closing.bias),
        closing.weight2,
    )


def _planes(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows, (N, H, W, C), as planes in the layout of results that stand beside `like`."""
    return rows.movedim(-1, 1).contiguous(memory_format=plane_format(like))
