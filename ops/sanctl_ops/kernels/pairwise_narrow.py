"""Launches of pairwise_narrow.cu: weighted sums of few values, and their gradients."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import DIVISOR, divisor, structure
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_saved import Saved
from sanctl_ops.kernels.runtime import Argument, kernel, launch

SOURCE = "pairwise_narrow.cu"
# As in pairwise_narrow.cu.
SIDE = 16
WEIGHTS, CHANNELS, KERNEL_SIZE = 2, 16, 3
SQUARES = np.dtype(
    [(name, DIVISOR) for name in ("across", "down")]
    + [(name, np.int32) for name in ("height", "width")]
)


def serves(layout: Layout) -> bool:
    """Tell whether these kernels take such layers."""
    sizes = (layout.weights, layout.channels, layout.kernel_size)
    return sizes == (WEIGHTS, CHANNELS, KERNEL_SIZE)


def aggregate(value: Tensor, saved: Saved, layout: Layout) -> Tensor:
    """Return the weighted sums of the `pixels_of` values, (N, H, W, C)."""
    out = value.new_empty(value.shape)
    arguments = (saved.logits, saved.log_sums, value, out)
    _launch("pairwise_aggregate_narrow", layout, value, arguments, value.stride(2))
    return out


def logits_gradient(
    grad: Tensor, value: Tensor, out: Tensor, saved: Saved, most_slope: Tensor, layout: Layout
) -> Tensor:
    """Return the gradient of the natural logits, scaled; planes by rows, values by `pixels_of`."""
    grad_logits = torch.empty_like(saved.logits)
    most = (saved.most_value, most_slope)
    arguments = (grad, saved.logits, saved.log_sums, value, out, grad_logits, *most)
    _launch("pairwise_logits_gradient_narrow", layout, value, arguments, value.stride(2))
    return grad_logits


def value_gradient(grad: Tensor, saved: Saved, layout: Layout) -> Tensor:
    """Return the gradient of the values, by rows as grad is."""
    grad_value = torch.empty_like(grad)
    arguments = (grad, saved.logits, saved.log_sums, grad_value)
    _launch("pairwise_value_gradient_narrow", layout, grad, arguments)
    return grad_value


@cache
def _squares(height: int, width: int) -> tuple[int, np.ndarray]:
    """Return how many squares an image is cut into, and struct Squares."""
    down, across = -(-height // SIDE), -(-width // SIDE)
    return down * across, structure((divisor(across), divisor(down), height, width), SQUARES)


def _launch(
    name: str, layout: Layout, rows: Tensor, arguments: tuple[Argument, ...], *pitch: int
) -> None:
    of_image, squares = _squares(layout.height, layout.width)
    launch(
        kernel(SOURCE, name, rows.dtype),
        rows.device,
        layout.images * of_image,
        SIDE**2,
        (*arguments, squares, *pitch),
    )
