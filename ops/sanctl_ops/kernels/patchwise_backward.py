"""Launches of the CUDA kernels behind patchwise attention's backward pass."""

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels import patchwise as forward_pass
from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.patchwise import JOINING, PLANES, Parameters, rows_of_sums
from sanctl_ops.kernels.patchwise_fold import (
    THREADS,
    Known,
    blocks_for,
    close_first,
    close_second,
    fold_first_turned,
    fold_relation,
)
from sanctl_ops.kernels.patchwise_plan import Sizes
from sanctl_ops.kernels.patchwise_relations import first_sums, image_gradients
from sanctl_ops.kernels.patchwise_values import slopes, value_gradient
from sanctl_ops.kernels.runtime import kernel, launch


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
