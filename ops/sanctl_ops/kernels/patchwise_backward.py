"""Launches of the CUDA kernels behind patchwise attention's backward pass."""

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels import patchwise as forward_pass
from sanctl_ops.kernels import patchwise_narrow as narrow
from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.patchwise import (
    JOINING,
    PLANES,
    Parameters,
    rows_of_sums,
    template,
    warps_for,
    warps_together,
)
from sanctl_ops.kernels.patchwise_fold import (
    THREADS,
    Known,
    blocks_for,
    close_first,
    close_second,
    floats,
    fold_first_turned,
    fold_relation,
    fold_second,
    join,
)
from sanctl_ops.kernels.patchwise_plan import Sizes
from sanctl_ops.kernels.runtime import kernel, launch

# Blocks of 7 warps of patchwise_weight_gradient that a multiprocessor holds, by hidden tiles.
RESIDENT = {1: 4, 2: 4, 4: 3, 8: 2}


def slopes(
    sizes: Sizes, grad: Tensor, value: Tensor, rectified: Tensor, layer: Parameters
) -> tuple[Tensor, Tensor]:
    """Return the rectified values' gradients in parts, (WT, N * HW, Cw), and the weights' sums."""
    if sizes.narrow:
        second = (layer.weight2, layer.bias2)
        return narrow.slopes(sizes, grad, value, rectified, *second)
    turned, _ = fold_second(sizes, layer.weight2, layer.bias2, turned=True)
    tiling = plan.tiling(sizes, plan.bytes_of_slopes)
    assert tiling is not None
    parts = sizes.hidden_tiles
    shared_bytes = plan.bytes_of_slopes(sizes, tiling)
    blocks = plan.shares_of(
        sizes.images * tiling.down * tiling.across,
        -(-plan.resident_blocks(grad.device, shared_bytes) // parts),
    )
    gradients = floats(grad, parts * sizes.images * sizes.pixels * sizes.hidden)
    rows = 1 if parts == 1 else parts // 2 + 1
    sums = torch.empty(parts * sizes.taps * rows * 128, dtype=torch.float64, device=grad.device)
    partials = floats(grad, blocks * sums.numel())
    launch(
        kernel("patchwise_slopes.cu", "patchwise_slopes", grad.dtype, *template(sizes)),
        grad.device,
        blocks * parts,
        warps_together(sizes, tiling.paired.products) * WARP,
        (
            grad,
            value,
            rectified,
            turned,
            gradients,
            partials,
            plan.shape_argument(sizes, tiling, value=value, grad=grad),
            blocks,
        ),
        shared_bytes,
    )
    join(partials, blocks, sums)
    return gradients, sums


def hidden_gradient(
    sizes: Sizes, gradients: Tensor, hidden: Tensor, rectified: Tensor, norm: Known, by_batch: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the hidden values' gradients as scaled halves, their scales, and the norm's two."""
    device, channels = hidden.device, sizes.hidden
    rows, count = rows_of_sums(sizes), hidden.numel()
    partials = torch.empty(rows * 4 * channels, dtype=torch.float64, device=device)
    launch(
        kernel(PLANES, "patchwise_slopes_of_hidden", torch.float32, sizes.hidden_tiles),
        device,
        rows,
        THREADS,
        (
            gradients,
            hidden,
            rectified,
            norm.mean,
            norm.variance,
            norm.eps,
            partials,
            channels,
            sizes.hidden_width,
            np.uint32(count),
            np.uint32(rows * THREADS),
        ),
        THREADS * 8,
    )
    weight, bias = hidden.new_empty(channels), hidden.new_empty(channels)
    factors, scales = hidden.new_empty(3 * channels), hidden.new_empty(2)
    launch(
        kernel(PLANES, "patchwise_join_slopes", torch.float32),
        device,
        1,
        JOINING,
        (
            partials,
            norm.mean,
            norm.variance,
            norm.weight,
            norm.eps,
            weight,
            bias,
            factors,
            scales,
            channels,
            rows,
            float(count // channels if by_batch else 0),
        ),
        JOINING * 8,
    )
    gradient = torch.empty_like(rectified)
    pairs = gradient.numel() // 2
    launch(
        kernel(PLANES, "patchwise_gradient_of_hidden", torch.float32),
        device,
        blocks_for(pairs),
        THREADS,
        (
            gradients,
            hidden,
            norm.mean,
            factors,
            scales,
            gradient,
            channels,
            sizes.hidden_width,
            np.uint32(pairs),
        ),
    )
    return gradient, scales, weight, bias


def first_sums(
    sizes: Sizes, query: Tensor, key: Tensor, units: Tensor, affine: Tensor, gradient: Tensor
) -> Tensor:
    """Return what `close_first` takes: sums over pixels, for the keys' taps and then the query."""
    if sizes.narrow:
        return narrow.first_sums(sizes, query, key, units, affine, gradient)
    tiles, parts = sizes.relation_tiles, sizes.hidden_tiles
    of_tap = tiles * 2 * parts * 128
    sums = torch.empty((sizes.taps + 1) * of_tap, dtype=torch.float64, device=key.device)
    tiling = plan.tiling(sizes, plan.bytes_of_weight_gradient)
    assert tiling is not None
    size, shape = sizes.kernel_size, plan.shape_argument(sizes, tiling, query=query, key=key)
    most = plan.multiprocessors(key.device) * RESIDENT[parts] * 7 // size
    for image, is_query, rows in ((key, False, size), (query, True, 1)):
        shares = plan.shares_of(sizes.images * tiling.down * tiling.across, most // (tiles * rows))
        out = sums[-of_tap:] if is_query else sums[:-of_tap]
        # A warp has a tap, or of the query a share of the pixels, of its own.
        joined = shares * size if is_query else shares
        partials = floats(key, joined * out.numel())
        launch(
            kernel(
                "patchwise_weight_gradient.cu",
                "patchwise_weight_gradient",
                *(key.dtype, *template(sizes), is_query),
            ),
            key.device,
            tiles * rows * shares,
            size * WARP,
            (image, units, affine, gradient, partials, shape, shares),
            plan.bytes_of_weight_gradient(sizes, tiling),
        )
        join(partials, joined, out)
    return sums


def image_gradients(
    sizes: Sizes,
    query: Tensor,
    key: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    gradient: tuple[Tensor, Tensor],
    taken: Tensor,
    by_batch: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and key, channels_last.

    Args:
        sizes: of the layer.
        query: as the kernels take it.
        key: the same.
        factors: the units, the relation's factors, and the first convolution's transpose.
        gradient: the hidden values', and its scales.
        taken: what the statistics take back.
        by_batch: whether they do.
    """
    if sizes.narrow:
        return narrow.image_gradients(sizes, query, key, (*factors, *gradient, taken), by_batch)
    tiling = plan.tiling(sizes, plan.bytes_of_relation_gradient)
    assert tiling is not None
    out_query, out = (plan.channels_last_like(x) for x in (query, key))
    parts = 2 * sizes.relation_tiles // sizes.relation_at_once
    launch(
        kernel(
            "patchwise_relation_gradient.cu",
            "patchwise_relation_gradient",
            *(key.dtype, *template(sizes)),
        ),
        key.device,
        sizes.images * tiling.down * tiling.across * parts,
        warps_together(sizes, tiling.products) * WARP,
        (
            query,
            key,
            *factors,
            *gradient,
            taken,
            out_query,
            out,
            plan.shape_argument(sizes, tiling, query=query, key=key),
            parts,
            int(by_batch),
        ),
        plan.bytes_of_relation_gradient(sizes, tiling),
    )
    return out_query, out


def value_gradient(sizes: Sizes, grad: Tensor, rectified: Tensor, layer: Parameters) -> Tensor:
    """Return the gradient of the values, channels_last."""
    if sizes.narrow:
        return narrow.value_gradient(sizes, grad, rectified, layer.weight2, layer.bias2)
    second, biases = fold_second(sizes, layer.weight2, layer.bias2)
    tiling = plan.tiling(sizes, plan.bytes_of_value_gradient)
    assert tiling is not None
    out = plan.channels_last_like(grad)
    parts = sizes.hidden_tiles
    shared_bytes = plan.bytes_of_value_gradient(sizes, tiling)
    blocks = plan.shares_of(
        sizes.images * tiling.down * tiling.across,
        -(-plan.resident_blocks(grad.device, shared_bytes) // parts),
    )
    # What positions beyond the image get, on its way to the pixels that they mirror.
    pitch = (tiling.halo - tiling.rows * tiling.columns) * plan.VALUES
    mirrors = rectified.new_empty(blocks * parts * pitch)
    launch(
        kernel(
            "patchwise_value_gradient.cu",
            "patchwise_value_gradient",
            *(grad.dtype, *template(sizes)),
        ),
        grad.device,
        blocks * parts,
        warps_for(tiling.paired.products) * WARP,
        (
            grad,
            rectified,
            second,
            biases,
            mirrors,
            out,
            plan.shape_argument(sizes, tiling, grad=grad),
            blocks,
            pitch,
        ),
        shared_bytes,
    )
    return out


def backward(
    sizes: Sizes,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    layer: Parameters,
    by_batch: tuple[bool, bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value (channels_last) and the layer's parameters."""
    grad, query, key, value = (plan.by_pixels(x) for x in (grad, query, key, value))
    norm1, norm2 = forward_pass.known(layer.norm1), forward_pass.known(layer.norm2)
    assert norm1 is not None
    assert norm2 is not None
    rectified = forward_pass.rectified(sizes, hidden, norm2)
    gradients, sums = slopes(sizes, grad, value, rectified, layer)
    second = close_second(sizes, sums)
    gradient, scales, *grad_norm2 = hidden_gradient(
        sizes, gradients, hidden, rectified, norm2, by_batch[1]
    )
    affine, units = fold_relation(sizes, norm1, sharp=True)
    sums = first_sums(sizes, query, key, units, affine, gradient)
    weight1, *grad_norm1, taken = close_first(
        sizes, sums, scales, layer.weight1, norm1, by_batch[0]
    )
    factors = (units, affine, fold_first_turned(sizes, layer.weight1, norm1))
    images = image_gradients(sizes, query, key, factors, (gradient, scales), taken, by_batch[0])
    grad_value = value_gradient(sizes, grad, rectified, layer)
    return *images, grad_value, *grad_norm1, weight1, *grad_norm2, *second
