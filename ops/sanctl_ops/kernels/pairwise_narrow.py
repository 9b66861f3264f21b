"""Launches of pairwise_narrow.cu and pairwise_narrow_relation.cu: layers of few channels."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import DIVISOR, WARP, divisor, structure
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_saved import Packed, Saved
from sanctl_ops.kernels.runtime import Argument, kernel, launch

VALUES = "pairwise_narrow.cu"
RELATION = "pairwise_narrow_relation.cu"
# As in the sources.
SIDE = 16
WEIGHTS, KERNEL_SIZE, CHANNELS, FEW = 2, 3, 16, 4
GRAM_SUMS, WEIGHT_SUMS = 28, 36
# Blocks that sums over all pixels are dealt out to, at least, where there are squares enough.
SHARES = 1024
SQUARES = np.dtype(
    [(name, DIVISOR) for name in ("across", "down")]
    + [(name, np.int32) for name in ("height", "width")]
)


def takes_values(layout: Layout) -> bool:
    """Tell whether there are kernels for the values of such a layer."""
    return _is_narrow(layout) and layout.channels == CHANNELS


def takes_relation(layout: Layout) -> bool:
    """Tell whether there are kernels for the relation of such a layer."""
    return _is_narrow(layout) and layout.relation <= FEW


def _is_narrow(layout: Layout) -> bool:
    return (layout.weights, layout.kernel_size) == (WEIGHTS, KERNEL_SIZE)


def gram(folded: Tensor, affine: Tensor, layout: Layout) -> Tensor:
    """Return the Gram matrix of z in parts, (parts, size, size), of which the upper half counts."""
    shape = _shares(layout)[0], layout.size, layout.size
    partials = folded.new_empty(shape, dtype=torch.float32)
    arguments = (folded[0], folded[1], affine, partials)
    _launch_sums("pairwise_gram_narrow", layout, arguments, GRAM_SUMS)
    return partials


def weigh(folded: Tensor, affine: Tensor, packed: Packed, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the logits and the logarithms of the sums of their powers."""
    logits = torch.empty(layout.logits_shape, dtype=torch.float16, device=folded.device)
    sums = torch.empty(layout.sums_shape, device=folded.device)
    arguments = (folded[0], folded[1], affine, packed.first, packed.second, logits, sums)
    of_image, squares = _squares(layout.height, layout.width)
    launch(
        kernel(RELATION, "pairwise_logits_narrow", torch.float32),
        folded.device,
        layout.images * of_image,
        SIDE**2,
        (*arguments, squares),
    )
    return logits, sums


def weight_sums(saved: Saved, grad_logits: Tensor, layout: Layout) -> Tensor:
    """Return sums for the gradients of both convolutions in parts, (parts, hidden, columns)."""
    shape = _shares(layout)[0], layout.hidden_rows, layout.size + 8
    partials = grad_logits.new_empty(shape, dtype=torch.float32)
    planes = (saved.folded[0], saved.folded[1], saved.affine)
    arguments = (*planes, saved.packed.first, saved.packed.back, grad_logits, partials)
    _launch_sums("pairwise_weights_gradient_narrow", layout, arguments, WEIGHT_SUMS)
    return partials


def aggregate(value: Tensor, saved: Saved, layout: Layout) -> Tensor:
    """Return the weighted sums of the `pixels_of` values, (N, H, W, C)."""
    out = value.new_empty(value.shape)
    arguments = (saved.logits, saved.log_sums, value, out)
    _launch_values("pairwise_aggregate_narrow", layout, value, arguments, value.stride(2))
    return out


def logits_gradient(
    grad: Tensor, value: Tensor, out: Tensor, saved: Saved, most_slope: Tensor, layout: Layout
) -> Tensor:
    """Return the gradient of the natural logits, scaled; planes by rows, values by `pixels_of`."""
    grad_logits = torch.empty_like(saved.logits)
    most = (saved.most_value, most_slope)
    arguments = (grad, saved.logits, saved.log_sums, value, out, grad_logits, *most)
    _launch_values("pairwise_logits_gradient_narrow", layout, value, arguments, value.stride(2))
    return grad_logits


def value_gradient(grad: Tensor, saved: Saved, layout: Layout) -> Tensor:
    """Return the gradient of the values, by rows as grad is."""
    grad_value = torch.empty_like(grad)
    arguments = (grad, saved.logits, saved.log_sums, grad_value)
    _launch_values("pairwise_value_gradient_narrow", layout, grad, arguments)
    return grad_value


@cache
def _squares(height: int, width: int) -> tuple[int, np.ndarray]:
    """Return how many squares an image is cut into, and struct Squares."""
    down, across = -(-height // SIDE), -(-width // SIDE)
    return down * across, structure((divisor(across), divisor(down), height, width), SQUARES)


def _shares(layout: Layout) -> tuple[int, int, int]:
    """Return how many blocks sum up over pixels, squares that each takes, and squares of all."""
    all_squares = layout.images * _squares(layout.height, layout.width)[0]
    each = max(1, all_squares // SHARES)
    return -(-all_squares // each), each, all_squares


def _launch_values(
    name: str, layout: Layout, rows: Tensor, arguments: tuple[Argument, ...], *pitch: int
) -> None:
    of_image, squares = _squares(layout.height, layout.width)
    launch(
        kernel(VALUES, name, rows.dtype),
        rows.device,
        layout.images * of_image,
        SIDE**2,
        (*arguments, squares, *pitch),
    )


def _launch_sums(
    name: str, layout: Layout, arguments: tuple[Tensor, ...], sums_of_thread: int
) -> None:
    blocks, each, all_squares = _shares(layout)
    launch(
        kernel(RELATION, name, torch.float32),
        arguments[0].device,
        blocks,
        SIDE**2,
        (*arguments, _squares(layout.height, layout.width)[1], each, all_squares),
        sums_of_thread * 4 * SIDE**2 // WARP,
    )
