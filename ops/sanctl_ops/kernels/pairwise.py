"""Pairwise attention by kernels: which follow which, forward and backward."""

import torch
from torch import Tensor

from sanctl_ops import pairwise_formulas as formulas
from sanctl_ops.attention import Norm
from sanctl_ops.kernels import pairwise_launches as launches
from sanctl_ops.kernels.pairwise_launches import Planes, Saved
from sanctl_ops.kernels.pairwise_layout import TAIL, Layout
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
    folded, affine, mean1, variance1 = launches.fold(planes, layout, *norm1)
    side = layout.relation + 3
    gram = torch.empty(side, side, dtype=torch.float64, device=value.device)
    mean2, variance2 = norm2.mean, norm2.variance
    if mean2 is None or variance2 is None:
        gram = launches.gram(folded, affine, layout)
        mean2, variance2 = formulas.statistics2(gram, weight1)
    layers = _layers(norm1, weight1, norm2, weight2, (mean1, variance1, mean2, variance2))
    logits, log_sums = launches.weigh(folded, affine, layers, layout)
    rows = launches.rows_of(value)
    scale = launches.scale_of(rows, launches.MOST_VALUE)
    saved = Saved(gram, folded, affine, logits, log_sums, scale)
    out = _planes(launches.aggregate(rows, saved, layout), value)
    mean2, variance2 = (x.to(torch.float32, copy=True) for x in (mean2, variance2))
    return out, (mean1, variance1, mean2, variance2), saved


def empty_saved(query: Tensor, layout: Layout) -> Saved:
    """Return what `forward` saves, its values left open."""
    half, side = torch.float16, layout.relation + 3
    images, slabs, _, plane, slots = layout.logits_shape
    return Saved(
        query.new_empty(side, side, dtype=torch.float64),
        query.new_empty(2, images, plane, layout.size, dtype=half),
        query.new_empty(2 * TAIL, dtype=half),
        query.new_empty(layout.logits_shape, dtype=half),
        query.new_empty(images, slabs, plane, slots, dtype=torch.float32),
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
    weight2: Tensor,
    by_batch: tuple[bool, bool],
    saved: Saved,
    layout: Layout,
) -> formulas.Gradients:
    """Return the gradients; the norms hold the statistics that the forward pass went by."""
    statistics = (norm1.mean, norm1.variance, norm2.mean, norm2.variance)
    layers = _layers(norm1, weight1, norm2, weight2, statistics, by_batch[1])
    grad, value_rows, out = (launches.rows_of(x) for x in (grad, value, out))
    scales = torch.cat((saved.scale, launches.scale_of(grad, launches.MOST_SLOPE)))
    scale = scales.double().prod()
    grad_logits = launches.logits_gradient(grad, value_rows, out, saved, scales, layout)
    grad_value = _planes(launches.value_gradient(grad, saved, scales, layout), value)
    sums, grad_weight2 = launches.weight_sums(saved, grad_logits, layers, layout)
    closing = formulas.close2(sums / scale, saved.gram, layers, layout.terms)
    slopes = launches.relation_sums(saved, grad_logits, layers, closing, scale, layout)
    closed = launches.close(planes, layout, slopes, norm1, by_batch[0])
    return formulas.Gradients(
        closed.query,
        closed.key,
        grad_value,
        closed.position,
        (closed.weight, closed.bias),
        closing.weight1,
        (closing.weight, closing.bias),
        grad_weight2 / scale,
    )


def _layers(
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    statistics: tuple[Tensor | None, ...],
    by_batch2: bool = True,
) -> formulas.Layers:
    mean1, variance1, mean2, variance2 = statistics
    assert mean1 is not None
    assert variance1 is not None
    assert mean2 is not None
    assert variance2 is not None
    first = formulas.normalised(norm1.weight, norm1.bias, mean1, variance1, norm1.eps, True)
    second = formulas.normalised(norm2.weight, norm2.bias, mean2, variance2, norm2.eps, by_batch2)
    return formulas.Layers(first, weight1, second, weight2)


def _planes(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows, (N, H, W, C), as planes in the layout of results that stand beside `like`."""
    return rows.movedim(-1, 1).contiguous(memory_format=plane_format(like))
