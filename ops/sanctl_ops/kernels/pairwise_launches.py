"""Launches of the kernels of pairwise attention, forward and backward."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels.geometry import WARP, divisor_argument, strides_argument
from sanctl_ops.kernels.pairwise_layout import (
    DTYPES,
    MANY_CHANNELS_WARPS,
    MOST_WARPS,
    TAIL,
    Layout,
    Tiles,
    tiles,
    tiles_of_share,
)
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES, Argument, kernel, launch
from sanctl_ops.window import empty_planes

PLANES = "pairwise_planes.cu"
GRAM = "pairwise_gram.cu"
LOGITS = "pairwise_logits.cu"
SUMS = "pairwise_sums.cu"
WEIGHTS = "pairwise_weights.cu"
WEIGHTS_GRADIENT = "pairwise_weights_gradient.cu"
RELATION_GRADIENT = "pairwise_relation_gradient.cu"

# As in pairwise_planes.cu: threads of a block, and doubles of its struct Moments.
THREADS = 256
MOMENTS = 5
# As in pairwise_gram.cu and pairwise_weights_gradient.cu.
GRAM_PARTS = {128: 4}
HIDDEN_ROWS = {32: 2, 64: 2}
# As in pairwise_weights.cu.
WEIGHTS_THREADS = 128
JOINING = 512


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
        # Columns are counted in 32 bits.
        close = (x if x.stride(3) * x.shape[3] < 2**31 else x.contiguous() for x in planes)
        return tuple(a for x in close for a in (x, strides_argument(x)))


def layout_of(query: Tensor, value: Tensor, weights: int, kernel_size: int) -> Layout:
    """Return the layout of a layer; where shapes are symbolic, all but the batch become fixed."""
    images, *sides = query.shape
    relation, height, width = map(int, sides)
    channels = int(value.shape[1])
    return Layout(images, height, width, relation, int(weights), channels, kernel_size)


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
    """Return the tiles over relations, over keys' relations, over values and over keys' values.

    They do not depend on the number of images.
    """
    relation, values, slopes = _bytes(layout)
    layout = replace(layout, images=1)
    few = MANY_CHANNELS_WARPS if layout.rel > 16 else MOST_WARPS
    return (
        tiles(layout, False, few, relation, MOST_SHARED_BYTES),
        tiles(layout, True, few, relation, MOST_SHARED_BYTES),
        tiles(layout, False, MOST_WARPS, values, MOST_SHARED_BYTES),
        tiles(layout, True, MOST_WARPS, slopes, MOST_SHARED_BYTES),
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
    statistics = [torch.empty(relation + 2, device=device) for _ in range(2)]
    if mean is not None and variance is not None:
        statistics = [x.to(torch.float32, copy=True) for x in (mean, variance)]
    constants = torch.empty(relation + 2, 2, device=device)
    affine = torch.empty(2 * TAIL, dtype=torch.float16, device=device)
    launch(
        kernel(PLANES, "pairwise_join_moments", layout.rel, running),
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
        kernel(PLANES, "pairwise_fold_relation", planes.query.dtype, layout.rel),
        device,
        -(-folded[0].numel() // (8 * THREADS)),
        THREADS,
        (
            *(*planes.arguments, moments, constants, folded[0], folded[1]),
            *(divisor_argument(layout.width), divisor_argument(layout.height), *sizes, parts),
        ),
    )
    return folded, affine, statistics[0], statistics[1]


def gram(folded: Tensor, affine: Tensor, layout: Layout) -> Tensor:
    """Return the upper half of the Gram matrix of z, of all slots and in float64."""
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
    return _join(partials)


def _join(partials: Tensor) -> Tensor:
    """Sum up over the first dimension in float64, in a fixed order."""
    sums = partials.new_empty(partials.shape[1:], dtype=torch.float64)
    elements = sums.numel()
    launch(
        kernel(WEIGHTS, "pairwise_join", torch.float32),
        partials.device,
        -(-elements // WARP),
        JOINING,
        (partials, sums, partials.shape[0], elements),
        JOINING * 8,
    )
    return sums


@dataclass(frozen=True)
class Packed:
    """Weights as the passes read them.

    Attributes:
        first: of the first convolution with the second normalisation, by hidden channels.
        second: of the second convolution, by weight channels, for logits to base 2.
        back: of the second convolution, by hidden channels.
    """

    first: Tensor
    second: Tensor
    back: Tensor


def empty_packed(like: Tensor, layout: Layout) -> Packed:
    """Return packed weights whose values are left open."""

    def packed(rows: int, columns: int) -> Tensor:
        return like.new_empty(rows * -(-columns // 32) * 32, dtype=torch.float16)

    first = packed(layout.hidden_rows, layout.size)
    second = packed(8 * layout.slabs, layout.hidden)
    return Packed(first, second, packed(layout.hidden_rows, 8 * layout.slabs))


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
        WEIGHTS_THREADS,
        (
            *(found if sums is None else sums, wide(weight1), wide(weight2)),
            *(wide(norm.weight), wide(norm.bias), mean, variance, found),
            *(packed.first, packed.second, packed.back, float(norm.eps)),
            *(layout.relation, layout.weights),
        ),
        WEIGHTS_THREADS * 8,
    )
    return packed, found, mean, variance


def wide(values: Tensor) -> Tensor:
    """Return values in float32, dense."""
    return values.float().contiguous()


def weigh(folded: Tensor, affine: Tensor, packed: Packed, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the logits and the logarithms of the sums of their powers."""
    cut, device = _walk(layout, 0), folded.device
    logits = torch.empty(layout.logits_shape, dtype=torch.float16, device=device)
    sums = torch.empty(layout.images, layout.slabs, layout.plane, layout.slots, device=device)
    launch(
        kernel(LOGITS, "pairwise_logits", layout.rel, layout.kernel_size),
        device,
        layout.images * cut.of_image,
        cut.warps * WARP,
        (
            *(folded[0], folded[1], affine, packed.first, packed.second),
            *(logits, sums, cut.argument, layout.slots),
        ),
        cut.staged * 2 * layout.size,
    )
    return logits, sums


@dataclass(frozen=True)
class Saved:
    """What the backward pass takes from the forward pass.

    Attributes:
        gram: the Gram matrix of z, as `pairwise_formulas.gram` returns it.
        folded: the folded planes of query and key, (2, N, H * W, rel + 8).
        affine: factors and summands of their last 8 channels.
        packed: the weights.
        logits: to base 2, (N, slabs, K*K, H * W, slots).
        log_sums: logarithms to base 2 of the sums of their powers, (N, slabs, H * W, slots).
        most_value: the largest value, disregarding signs, (1,).
    """

    gram: Tensor
    folded: Tensor
    affine: Tensor
    packed: Packed
    logits: Tensor
    log_sums: Tensor
    most_value: Tensor


def rows_of(planes: Tensor) -> Tensor:
    """Return (N, H, W, C), dense and aligned for vectors; a view of channels_last planes."""
    rows = planes.movedim(1, -1).contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def largest(planes: Tensor) -> Tensor:
    """Return the largest value, disregarding signs, (1,)."""
    return torch.linalg.vector_norm(planes, math.inf, dtype=torch.float32).view(1)


def aggregate(value: Tensor, saved: Saved, layout: Layout) -> Tensor:
    """Return the weighted sums of values (N, H, W, C), laid out alike."""
    cut, out = _walk(layout, 2), torch.empty_like(value)
    sums = (saved.logits, saved.log_sums, value, out, saved.most_value)
    _launch_sums("pairwise_aggregate", layout, cut, value, sums, _bytes(layout)[1])
    return out


def logits_gradient(
    grad: Tensor, value: Tensor, out: Tensor, saved: Saved, most_slope: Tensor, layout: Layout
) -> Tensor:
    """Return the gradient of the natural logits, scaled; planes come by rows."""
    cut, grad_logits = _walk(layout, 2), torch.empty_like(saved.logits)
    most = (saved.most_value, most_slope)
    sums = (grad, saved.logits, saved.log_sums, value, out, grad_logits, *most)
    name = "pairwise_logits_gradient"
    _launch_sums(name, layout, cut, value, sums, _bytes(layout)[1], (layout.slots,))
    return grad_logits


def value_gradient(grad: Tensor, saved: Saved, most_slope: Tensor, layout: Layout) -> Tensor:
    """Return the gradient of the values, by rows as grad is."""
    cut, device = _walk(layout, 3), grad.device
    padded = torch.empty(layout.images, *layout.padded, layout.channels, device=device)
    sums = (grad, saved.logits, saved.log_sums, padded, most_slope)
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


def weight_sums(saved: Saved, grad_logits: Tensor, layout: Layout) -> Tensor:
    """Return sums for the gradients of both convolutions, by padded hidden channels, scaled."""
    cut, device = _walk(layout, 0), grad_logits.device
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
        max(cut.staged * 2 * layout.size, rows * columns * 4),
    )
    return _join(partials)


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
        WEIGHTS_THREADS,
        (
            *(sums, saved.gram, *most, weight1, wide(norm.weight), wide(norm.mean)),
            *(wide(norm.variance), weight, bias, grad1, grad2, factors),
            *(float(norm.eps), float(layout.terms), relation, layout.weights),
        ),
        WEIGHTS_THREADS * 8,
    )
    columns = -(-(layout.hidden + layout.size) // 32) * 32
    back = torch.empty(layout.size * columns, dtype=torch.float16, device=device)
    unscale = torch.empty(1, device=device)
    launch(
        kernel(WEIGHTS, "pairwise_pack_back", layout.rel),
        device,
        layout.size,
        WEIGHTS_THREADS,
        (factors, *most, weight1, back, unscale, relation),
        WEIGHTS_THREADS * 8,
    )
    return Closing(weight, bias, grad1, grad2, back, unscale)


def relation_sums(
    saved: Saved, grad_logits: Tensor, closing: Closing, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return the gradient behind norm1 summed over queries' taps and, negative, padded keys'."""
    device = grad_logits.device
    weights = (saved.packed.first, saved.packed.back, closing.back)
    found = []
    for keys in (False, True):
        cut = _walk(layout, int(keys))
        pixels = math.prod(layout.padded) if keys else layout.plane
        grad = torch.empty(layout.images, pixels, layout.size, device=device)
        parameters = (layout.rel, layout.kernel_size, keys)
        launch(
            kernel(RELATION_GRADIENT, "pairwise_relation_gradient", *parameters),
            device,
            layout.images * cut.of_image,
            cut.warps * WARP,
            (
                *(saved.folded[0], saved.folded[1], saved.affine, *weights, grad_logits),
                *(closing.unscale, grad, cut.argument, layout.slots),
            ),
            cut.staged * 2 * layout.size,
        )
        found.append(grad)
    return found[0], found[1]


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
        kernel(PLANES, "pairwise_close", dtype, layout.kernel_size),
        device,
        blocks,
        THREADS,
        (*planes.arguments, *slopes, mean, constants, *outputs, *sizes),
    )
    grad_position = of_positions.sum(0).view(planes.position.shape)
    return Closed(grad_query, grad_key, grad_position, grad_weight, grad_bias)
