"""What the operators that relate a window's centre in one tensor to its taps in another share."""

from typing import Any

import torch
from torch import Tensor

from sanctl_ops.checks import check_alike, check_image, check_window
from sanctl_ops.window import Window, plane_format


def check_related(window: Window, x1: Tensor, x2: Tensor) -> None:
    """Raise ValueError unless x1 and x2 are alike, (N, C, H, W), and the window fits them."""
    check_image("x1", x1)
    check_image("x2", x2)
    if x1.shape != x2.shape:
        raise ValueError(f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} differ in shape")
    check_alike("x1", x1, "x2", x2)
    check_window(window, x1)


def save_planes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep for the backward pass the sides of x1, whether it is channels_last, and the window."""
    x1, _, *ctx.window = inputs
    ctx.planes = (*x1.shape[2:], plane_format(x1) == torch.channels_last)


def empty_gradients(
    grad: Tensor, channels: int, height: int, width: int, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Return memory for the gradients of x1 and x2, (N, channels, height, width) each."""
    shape = (grad.shape[0], channels, height, width)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad1, grad2 = (
        torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        for _ in range(2)
    )
    return grad1, grad2
