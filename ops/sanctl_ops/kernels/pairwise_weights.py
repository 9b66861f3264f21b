"""Launches for sums over all pixels, and for the weights that come of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sanctl_ops.attention import Norm, dense
from sanctl_ops.kernels import pairwise_narrow
from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_saved import Packed, Saved, empty_packed
from sanctl_ops.kernels.pairwise_tiles import relation_walk, tiles_of_share
from sanctl_ops.kernels.runtime import kernel, launch

GRAM = "pairwise_gram.cu"
WEIGHTS = "pairwise_weights.cu"
WEIGHTS_GRADIENT = "pairwise_weights_gradient.cu"

# As in pairwise_gram.cu and pairwise_weights_gradient.cu.
GRAM_PARTS = {128: 4}
HIDDEN_ROWS = {32: 2, 64: 2}
# As in pairwise_weights.cu.
THREADS = 128
JOINING = 512
JOINED = 8


def gram(folded: Tensor, affine: Tensor, layout: Layout) -> Tensor:
    """Return the upper half of the Gram matrix of z, of all slots and in float64."""
    if pairwise_narrow.takes_relation(layout):
        return _join(pairwise_narrow.gram(folded, affine, layout))
    cut = relation_walk(layout)
    each = tiles_of_share(layout, cut)
    all_tiles = layout.images * cut.of_image
    shares, parts = -(-all_tiles // each), GRAM_PARTS.get(layout.rel, 1)
    size = layout.size
    partials = torch.empty(shares, size, size, device=folded.device)
    # A part's rows of 16 x 8 sums, one of every lane's four behind the other.
    joined = -(-((size // 8 + 1) // 2) // parts) * (size // 8) * 128 * 4
    launch(
        kernel(GRAM, "pairwise_gram", layout.rel, layout.kernel_size),
        folded.device,
        shares * parts,
        cut.warps * WARP,
        (folded[0], folded[1], affine, partials, cut.argument, each, all_tiles),
        max(cut.shared_bytes, joined),
    )
    return _join(partials)


def weight_sums(saved: Saved, grad_logits: Tensor, layout: Layout) -> Tensor:
    """Return sums for the gradients of both convolutions, by padded hidden channels, scaled."""
    if pairwise_narrow.takes_relation(layout):
        return _join(pairwise_narrow.weight_sums(saved, grad_logits, layout))
    cut, device = relation_walk(layout), grad_logits.device
    each = tiles_of_share(layout, cut)
    all_tiles = layout.images * cut.of_image
    shares, rows = -(-all_tiles // each), HIDDEN_ROWS.get(layout.rel, 1) * 16
    columns = layout.size + 8 * layout.slabs
    partials = torch.empty(shares, layout.hidden_rows, columns, device=device)
    launch(
        kernel(WEIGHTS_GRADIENT, "pairwise_weights_gradient", layout.rel, layout.kernel_size),
        device,
        shares * (layout.hidden_rows // rows),
        cut.warps * WARP,
        (
            *(saved.folded[0], saved.folded[1], saved.affine, saved.packed.first),
            *(saved.packed.back, grad_logits, partials, cut.argument),
            *(layout.slots, each, all_tiles),
        ),
        max(cut.shared_bytes, rows * columns * 4),
    )
    return _join(partials)


def _join(partials: Tensor) -> Tensor:
    """Sum up over the first dimension in float64, in a fixed order."""
    sums = partials.new_empty(partials.shape[1:], dtype=torch.float64)
    elements = sums.numel()
    launch(
        kernel(WEIGHTS, "pairwise_join", torch.float32),
        partials.device,
        -(-elements // JOINED),
        JOINING,
        (partials, sums, partials.shape[0], elements),
        JOINING * 8,
    )
    return sums


def pack(
    sums: Tensor | None, weight1: Tensor, weight2: Tensor, norm: Norm, layout: Layout
) -> tuple[Packed, Tensor, Tensor, Tensor]:
    """Pack the weights, by the Gram matrix from `gram` or, without, by running statistics.

    Returns:
        The packed weights, the Gram matrix as `pairwise_formulas.gram` returns it (zero without
        sums), and the mean and variance that the second normalisation goes by.
    """
    device, side, running = weight1.device, layout.relation + 3, sums is None
    found = torch.empty(side, side, dtype=torch.float64, device=device)
    mean, variance = (torch.empty(layout.relation, device=device) for _ in range(2))
    if norm.mean is not None and norm.variance is not None:
        mean.copy_(norm.mean)
        variance.copy_(norm.variance)
    packed = empty_packed(weight1, layout)
    launch(
        kernel(WEIGHTS, "pairwise_pack", layout.rel, running),
        device,
        layout.hidden_rows,
        THREADS,
        (
            *(found if sums is None else sums, wide(weight1), wide(weight2)),
            *(wide(norm.weight), wide(norm.bias), mean, variance, found),
            *(packed.first, packed.second, packed.back, float(norm.eps)),
            *(layout.relation, layout.weights),
        ),
        THREADS * 8,
    )
    return packed, found, mean, variance


def wide(values: Tensor) -> Tensor:
    """Return values in float32, dense."""
    return dense(values, torch.float32)


@dataclass(frozen=True)
class Closing:
    """Gradients of the second normalisation and of the convolutions, and what leads on to z.

    Attributes:
        weight: gradient of the normalisation's scale.
        bias: gradient of its shift.
        weight1: gradient of the first convolution.
        weight2: gradient of the second one.
        back: what the gradient of z takes of that of the hidden channels and of z, packed.
        unscale: what undoes the scale of that, (1,).
    """

    weight: Tensor
    bias: Tensor
    weight1: Tensor
    weight2: Tensor
    back: Tensor
    unscale: Tensor


def close2(
    sums: Tensor,
    saved: Saved,
    most_slope: Tensor,
    weight1: Tensor,
    norm: Norm,
    by_batch: bool,
    layout: Layout,
) -> Closing:
    """Close the backward pass of the second normalisation by the sums of `weight_sums`."""
    assert norm.mean is not None
    assert norm.variance is not None
    device, relation = sums.device, layout.relation
    weight1 = wide(weight1)
    weight, bias = (torch.empty(relation, device=device) for _ in range(2))
    grad1 = torch.empty(relation, relation + 2, device=device)
    grad2 = torch.empty(layout.weights, relation, device=device)
    factors = torch.empty(relation, 3, dtype=torch.float64, device=device)
    most = (saved.most_value, most_slope)
    launch(
        kernel(WEIGHTS, "pairwise_close2", layout.rel, by_batch),
        device,
        relation,
        THREADS,
        (
            *(sums, saved.gram, *most, weight1, wide(norm.weight), wide(norm.mean)),
            *(wide(norm.variance), weight, bias, grad1, grad2, factors),
            *(float(norm.eps), float(layout.terms), relation, layout.weights),
        ),
        THREADS * 8,
    )
    columns = -(-(layout.hidden + layout.size) // 32) * 32
    back = torch.empty(layout.size * columns, dtype=torch.float16, device=device)
    unscale = torch.empty(1, device=device)
    launch(
        kernel(WEIGHTS, "pairwise_pack_back", layout.rel),
        device,
        layout.size,
        THREADS,
        (factors, *most, weight1, back, unscale, relation),
        THREADS * 8,
    )
    return Closing(weight, bias, grad1, grad2, back, unscale)
