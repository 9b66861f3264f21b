"""Launches of the kernels of pairwise attention, forward and backward."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sanctl_ops import pairwise_formulas as formulas
from sanctl_ops.attention import Norm
from sanctl_ops.kernels.geometry import WARP, divisor_argument, strides_argument
from sanctl_ops.kernels.pairwise_layout import (
    DTYPES,
    TAIL,
    Layout,
    Tiles,
    pack,
    slots_of_relation,
    tiles,
    tiles_of_share,
)
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES, Argument, kernel, launch
from sanctl_ops.window import empty_planes

PLANES = "pairwise_planes.cu"
GRAM = "pairwise_gram.cu"
LOGITS = "pairwise_logits.cu"
SUMS = "pairwise_sums.cu"
WEIGHTS_GRADIENT = "pairwise_weights_gradient.cu"
RELATION_GRADIENT = "pairwise_relation_gradient.cu"

# As in pairwise_planes.cu: threads of a block, and doubles of its struct Moments.
THREADS = 256
MOMENTS = 5
# As in pairwise_gram.cu and pairwise_weights_gradient.cu.
GRAM_PARTS = {128: 4}
HIDDEN_ROWS = {32: 2, 64: 2}
# What values and slopes are scaled to at most: products of them, of 8 channels, stay in halves.
MOST_VALUE = 16.0
MOST_SLOPE = 32.0
MOST_BACK = 1024.0


@dataclass(frozen=True)
class Planes:
    """Query, key and position, whose layouts may be any."""

    query: Tensor
    key: Tensor
    position: Tensor

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Return them with their strides."""
        planes = (self.query, self.key, self.position)
        return tuple(a for x in planes for a in (x, strides_argument(x)))


@dataclass(frozen=True)
class Saved:
    """What the backward pass takes from the forward pass.

    Attributes:
        gram: the Gram matrix of z, as `pairwise_formulas.gram` returns it.
        folded: the folded planes of query and key, (2, N, H * W, rel + 8).
        affine: factors and summands of their last 8 channels.
        logits: to base 2, (N, slabs, K*K, H * W, slots).
        log_sums: logarithms to base 2 of the sums of their powers, (N, slabs, H * W, slots).
        scale: what values are multiplied by where they are halves.
    """

    gram: Tensor
    folded: Tensor
    affine: Tensor
    logits: Tensor
    log_sums: Tensor
    scale: Tensor


def layout_of(query: Tensor, value: Tensor, weights: int, kernel_size: int) -> Layout:
    """Return the layout of a layer."""
    images, relation, height, width = query.shape
    return Layout(images, height, width, relation, weights, value.shape[1], kernel_size)


def obstacle(query: Tensor, layout: Layout) -> str | None:
    """Return why the kernels cannot take these tensors, or None if they can."""
    if query.dtype not in DTYPES:
        return f"there are kernels for float16 and bfloat16, not for {query.dtype}"
    reason = layout.obstacle()
    if reason is None and any(each is None for each in _walks(layout)):
        reason = f"windows of {layout.kernel_size} pixels do not fit shared memory"
    return reason


def _bytes(layout: Layout) -> tuple[int, int, int]:
    """Return the bytes staged of a pixel: of folded planes, of values, and of slopes."""
    values = 2 * (8 * layout.blocks + 8)
    return 2 * layout.size, values, values + 4 * layout.slots


def _walks(layout: Layout) -> tuple[Tiles | None, ...]:
    """Return the tiles over relations, over keys' relations, over values and over keys' values."""
    relation, values, slopes = _bytes(layout)
    return (
        tiles(layout, False, relation, MOST_SHARED_BYTES),
        tiles(layout, True, relation, MOST_SHARED_BYTES),
        tiles(layout, False, values, MOST_SHARED_BYTES),
        tiles(layout, True, slopes, MOST_SHARED_BYTES),
    )


def _walk(layout: Layout, which: int) -> Tiles:
    cut = _walks(layout)[which]
    assert cut is not None
    return cut


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
        kernel(PLANES, "pairwise_moments", planes.query.dtype, layout.kernel_size),
        device,
        (layout.images + 1) * parts,
        THREADS,
        (*planes.arguments, moments, *sizes, layout.height, layout.width, parts),
        THREADS * 3 * 8,
    )
    running = mean is not None and variance is not None
    statistics = torch.empty(2, relation + 2, device=device)
    if mean is not None and variance is not None:
        statistics = torch.stack((mean, variance)).float()
    constants = torch.empty(relation + 2, 2, device=device)
    affine = torch.empty(2 * TAIL, dtype=torch.float16, device=device)
    launch(
        kernel(PLANES, "pairwise_join_moments", layout.rel, running),
        device,
        relation + 2,
        THREADS,
        (
            *(moments, weight.float().contiguous(), bias.float().contiguous()),
            *(statistics[0], statistics[1], constants, affine, float(eps), float(layout.terms)),
            *(*sizes, parts),
        ),
        THREADS * 2 * 8,
    )
    shape = (2, layout.images, layout.plane, layout.size)
    folded = torch.empty(shape, dtype=torch.float16, device=device)
    launch(
        kernel(PLANES, "pairwise_fold_relation", planes.query.dtype, layout.rel),
        device,
        -(-folded[0].numel() // (8 * THREADS)),
        THREADS,
        (
            *(*planes.arguments, moments, constants, folded[0], folded[1]),
            *(divisor_argument(layout.width), divisor_argument(layout.height), *sizes, parts),
        ),
    )
    return folded, affine, statistics[0].clone(), statistics[1].clone()


def gram(folded: Tensor, affine: Tensor, layout: Layout) -> Tensor:
    """Return the Gram matrix of z with a constant 1 behind it, in float64."""
    cut = _walk(layout, 0)
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
        max(cut.staged * 2 * size, joined),
    )
    upper = partials.sum(0, dtype=torch.float64).triu()
    found = upper + upper.triu(1).T
    slots = slots_of_relation(layout, folded.device)
    return found[slots][:, slots]


def weigh(
    folded: Tensor, affine: Tensor, layers: formulas.Layers, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return the logits and the logarithms of the sums of their powers."""
    cut, device = _walk(layout, 0), folded.device
    logits = torch.empty(layout.logits_shape, dtype=torch.float16, device=device)
    sums = torch.empty(layout.images, layout.slabs, layout.plane, layout.slots, device=device)
    weight2 = layers.weight2.double() * math.log2(math.e)
    rows = 8 * layout.slabs
    weight2 = weight2.repeat(rows // layout.weights, 1)
    weight2 = F.pad(weight2, (0, layout.hidden - layout.relation))
    launch(
        kernel(LOGITS, "pairwise_logits", layout.rel, layout.kernel_size),
        device,
        layout.images * cut.of_image,
        cut.warps * WARP,
        (
            *(folded[0], folded[1], affine, _packed_weight1(layers, layout), pack(weight2)),
            *(logits, sums, cut.argument, layout.slots),
        ),
        cut.staged * 2 * layout.size,
    )
    return logits, sums


def _packed_weight1(layers: formulas.Layers, layout: Layout) -> Tensor:
    """Return the first convolution with the second normalisation, by hidden channels."""
    weight = layers.norm2.scale[:, None] * layers.weight1
    joined = torch.cat((weight, layers.norm2.shift[:, None]), 1)
    full = joined.new_zeros(max(16, layout.hidden), layout.size)
    full[: layout.relation].index_copy_(1, slots_of_relation(layout, full.device), joined)
    return pack(full)


def _packed_weight2(layers: formulas.Layers, layout: Layout) -> Tensor:
    """Return the second convolution transposed, by hidden channels."""
    more = (0, 8 * layout.slabs - layout.weights, 0, max(16, layout.hidden) - layout.relation)
    return pack(F.pad(layers.weight2.T, more))


def rows_of(planes: Tensor) -> Tensor:
    """Return (N, H, W, C), dense and aligned for vectors; a view of channels_last planes."""
    rows = planes.movedim(1, -1).contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def scale_of(planes: Tensor, most: float) -> Tensor:
    """Return a power of two that brings planes to `most` at most, (1,)."""
    largest = torch.linalg.vector_norm(planes, math.inf, dtype=torch.float32).clamp_min(1e-30)
    return torch.exp2(torch.floor(torch.log2(most / largest))).view(1)


def aggregate(value: Tensor, saved: Saved, layout: Layout) -> Tensor:
    """Return the weighted sums of values (N, H, W, C), laid out alike."""
    cut, out = _walk(layout, 2), torch.empty_like(value)
    scales = torch.cat((saved.scale, saved.scale))
    sums = (saved.logits, saved.log_sums, value, out, scales)
    _launch_sums("pairwise_aggregate", layout, cut, value, sums, _bytes(layout)[1])
    return out


def logits_gradient(
    grad: Tensor, value: Tensor, out: Tensor, saved: Saved, scales: Tensor, layout: Layout
) -> Tensor:
    """Return the gradient of the natural logits, multiplied by both scales; planes by rows."""
    cut, grad_logits = _walk(layout, 2), torch.empty_like(saved.logits)
    sums = (grad, saved.logits, saved.log_sums, value, out, grad_logits, scales)
    name = "pairwise_logits_gradient"
    _launch_sums(name, layout, cut, value, sums, _bytes(layout)[1], (layout.slots,))
    return grad_logits


def value_gradient(grad: Tensor, saved: Saved, scales: Tensor, layout: Layout) -> Tensor:
    """Return the gradient of the values, by rows as grad is."""
    cut, device = _walk(layout, 3), grad.device
    padded = torch.empty(layout.images, *layout.padded, layout.channels, device=device)
    sums = (grad, saved.logits, saved.log_sums, padded, scales)
    _launch_sums("pairwise_value_gradient", layout, cut, grad, sums, _bytes(layout)[2])
    folded = torch.empty_like(grad)
    launch(
        kernel(SUMS, "pairwise_fold", grad.dtype, layout.kernel_size),
        device,
        -(-folded.numel() // (8 * THREADS)),
        THREADS,
        (
            *(padded, folded, divisor_argument(layout.channels // 8)),
            *(divisor_argument(layout.width), divisor_argument(layout.height), layout.images),
        ),
    )
    return folded


def _launch_sums(
    name: str,
    layout: Layout,
    cut: Tiles,
    rows: Tensor,
    arguments: tuple[Argument, ...],
    bytes_of_pixel: int,
    known_slots: tuple[int, ...] = (),
) -> None:
    """Launch a kernel whose blocks take the channels of a slab of a tile.

    `known_slots` is a template's parameter; without it, the slots are an argument.
    """
    launch(
        kernel(SUMS, name, rows.dtype, layout.blocks, layout.kernel_size, *known_slots),
        rows.device,
        layout.images * cut.of_image * layout.slabs,
        cut.warps * WARP,
        (
            *(*arguments, cut.argument, divisor_argument(layout.slabs)),
            *(*(() if known_slots else (layout.slots,)), layout.channels, layout.step),
        ),
        cut.staged * bytes_of_pixel,
    )


def weight_sums(
    saved: Saved, grad_logits: Tensor, layers: formulas.Layers, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return what `close2` takes as sums, and the gradient of weight2, scaled as grad_logits."""
    cut, device = _walk(layout, 0), grad_logits.device
    each = tiles_of_share(layout, cut)
    all_tiles = layout.images * cut.of_image
    shares, rows = -(-all_tiles // each), HIDDEN_ROWS.get(layout.rel, 1) * 16
    hidden = max(16, layout.hidden)
    wide = layout.size + 8 * layout.slabs
    partials = torch.empty(shares, hidden, wide, device=device)
    launch(
        kernel(WEIGHTS_GRADIENT, "pairwise_weights_gradient", layout.rel, layout.kernel_size),
        device,
        shares * (hidden // rows),
        cut.warps * WARP,
        (
            *(saved.folded[0], saved.folded[1], saved.affine, _packed_weight1(layers, layout)),
            *(_packed_weight2(layers, layout), grad_logits, partials, cut.argument),
            *(layout.slots, each, all_tiles),
        ),
        max(cut.staged * 2 * layout.size, rows * wide * 4),
    )
    found = partials.sum(0, dtype=torch.float64)[: layout.relation]
    slots = slots_of_relation(layout, device)
    return found[:, slots], found[:, layout.size : layout.size + layout.weights].T


def relation_sums(
    saved: Saved,
    grad_logits: Tensor,
    layers: formulas.Layers,
    closing: formulas.Closing,
    scale: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Return the gradient behind norm1 summed over queries' taps and, negative, padded keys'.

    `scale` is that of grad_logits, in float64.
    """
    device = grad_logits.device
    back, unscale = _packed_back(closing, scale, layout)
    weights = (_packed_weight1(layers, layout), _packed_weight2(layers, layout), back)
    found = []
    for keys in (False, True):
        cut = _walk(layout, int(keys))
        pixels = math.prod(layout.padded) if keys else layout.plane
        grad = torch.empty(layout.images, pixels, layout.size, device=device)
        launch(
            kernel(
                RELATION_GRADIENT,
                "pairwise_relation_gradient",
                layout.rel,
                layout.kernel_size,
                keys,
            ),
            device,
            layout.images * cut.of_image,
            cut.warps * WARP,
            (
                *(saved.folded[0], saved.folded[1], saved.affine, *weights, grad_logits),
                *(unscale, grad, cut.argument, layout.slots),
            ),
            cut.staged * 2 * layout.size,
        )
        found.append(grad)
    return found[0], found[1]


def _packed_back(closing: formulas.Closing, scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return what makes dz of g2 and z, by channels of z, and what undoes its scale."""
    slots = slots_of_relation(layout, scale.device)
    of_z = torch.cat((closing.indirect, closing.constant[None])).T * -scale
    largest = torch.maximum(closing.direct.abs().amax(), of_z.abs().amax()).clamp_min(1e-30)
    power = torch.exp2(torch.floor(torch.log2(MOST_BACK / largest)))
    full = of_z.new_zeros(layout.size, layout.hidden + layout.size)
    full[slots[:-1], : layout.relation] = closing.direct.T * power
    full[slots[:-1, None], layout.hidden + slots] = of_z * power
    return pack(full), (1 / (power * scale)).float().view(1)


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
    device, relation = planes.query.device, layout.relation
    parts = -(-layout.padded[1] // (THREADS // relation))
    mean, variance = (x.float().contiguous() for x in (norm.mean, norm.variance))
    base = layout.rel or relation
    positions = [
        x[..., base : base + 2].sum(0, dtype=torch.float64).float().contiguous() for x in sums
    ]
    slopes = (*sums, *positions)
    totals = torch.empty(
        (layout.images * relation + 2) * parts, 2, dtype=torch.float64, device=device
    )
    sizes = (layout.images, relation, layout.height, layout.width, parts, layout.size)
    dtype, blocks = planes.query.dtype, (layout.images + 1) * parts
    launch(
        kernel(PLANES, "pairwise_close_sums", dtype, layout.kernel_size),
        device,
        blocks,
        THREADS,
        (*planes.arguments, *slopes, mean, totals, *sizes),
        THREADS * 2 * 8,
    )
    grad_weight, grad_bias = (torch.empty(relation + 2, device=device) for _ in range(2))
    constants = torch.empty(relation + 2, 3, device=device)
    launch(
        kernel(PLANES, "pairwise_join_close", by_batch),
        device,
        relation + 2,
        THREADS,
        (
            *(totals, norm.weight.float().contiguous(), mean, variance, grad_weight, grad_bias),
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
        kernel(PLANES, "pairwise_close", dtype, layout.kernel_size),
        device,
        blocks,
        THREADS,
        (*planes.arguments, *slopes, mean, constants, *outputs, *sizes),
    )
    grad_position = of_positions.sum(0).view(planes.position.shape)
    return Closed(grad_query, grad_key, grad_position, grad_weight, grad_bias)
