"""Differences between a window's centre in one tensor and its taps in another."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sanctl_ops.backend import runs_kernels
from sanctl_ops.kernels import subtraction2 as kernels
from sanctl_ops.relation import check_related, empty_gradients, save_planes
from sanctl_ops.window import Window, accumulation_dtype


def subtraction2(
    x1: Tensor,
    x2: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """Subtract the taps of every window in x2 from the window's centre in x1.

    `out[n, c, j, i] = x1[n, c, centre(i)] - x2[n, c, nbr(i, j)]`, where nbr(i, j) is tap j of the
    window at output pixel i and centre(i) its tap (K - 1) // 2 in both directions, which is the
    output pixel itself for odd K, stride 1 and padding dilation * (K - 1) / 2. This is the relation
    of pairwise self-attention (Zhao et al., CVPR 2020, section 3.1).

    Args:
        x1: (N, C, H, W), float16, bfloat16, float32 or float64, in any memory layout.
        x2: like x1: same shape, dtype and device.
        kernel_size: taps per side of the window, K.
        stride: pixels between neighbouring windows.
        padding: pixels added on each side of both tensors before the windows slide.
        dilation: pixels between neighbouring taps.
        pad_mode: "reflect" (without repeating the border pixel) or "zero".

    Returns:
        (N, C, K*K, P), contiguous; the P = Ho * Wo windows run row by row. The gradients of x1
        and x2 are channels_last if x1 is, else contiguous.

    Raises:
        ValueError: a tensor is not 4-d or of another type, shapes, dtypes or devices differ,
            kernel_size, stride or dilation is below 1, padding is negative, pad_mode is unknown,
            reflect padding is not smaller than the sides, or the window is larger than the padded
            input.
        BackendError: the CuPy kernels are asked for by name and cannot run on x1's device.
    """
    check_related(Window(kernel_size, stride, padding, dilation, pad_mode), x1, x2)
    return _subtraction2(x1, x2, kernel_size, stride, padding, dilation, pad_mode)


@torch.library.custom_op("sanctl::subtraction2", mutates_args=())
def _subtraction2(
    x1: Tensor,
    x2: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    pad_mode: str,
) -> Tensor:
    window = Window(kernel_size, stride, padding, dilation, pad_mode)
    if runs_kernels(x1.device):
        return kernels.forward(window, x1, x2)
    centre = window.centre_view(window.pad(x1))[:, :, None, None]
    taps = window.views(window.pad(x2))
    out = torch.empty(taps.shape, dtype=x1.dtype, device=x1.device)
    torch.sub(centre, taps, out=out)
    return out.flatten(-2).flatten(2, 3)


@_subtraction2.register_fake
def _(x1: Tensor, x2: Tensor, *args: Any) -> Tensor:
    window = Window(*args)
    batch, channels, height, width = x1.shape
    out_height, out_width = window.output_size(height, width)
    return x1.new_empty(batch, channels, window.taps, out_height * out_width)


@torch.library.custom_op("sanctl::subtraction2_backward", mutates_args=())
def _subtraction2_backward(
    grad: Tensor,
    height: int,
    width: int,
    channels_last: bool,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    pad_mode: str,
) -> tuple[Tensor, Tensor]:
    window = Window(kernel_size, stride, padding, dilation, pad_mode)
    grad1, grad2 = empty_gradients(grad, grad.shape[1], height, width, channels_last)
    if runs_kernels(grad.device):
        kernels.backward(window, grad, grad1, grad2)
        return grad1, grad2
    accumulate = accumulation_dtype(grad.dtype)
    taps = grad.unflatten(3, window.output_size(height, width))
    planes = (*grad.shape[:2], *window.padded_size(height, width))
    padded = torch.zeros(planes, dtype=accumulate, device=grad.device)
    window.centre_view(padded).copy_(taps.sum(2, dtype=accumulate))
    grad1.copy_(window.fold(padded))
    padded.zero_()
    for view, tap in zip(window.tap_views(padded), taps.unbind(2), strict=True):
        view.sub_(tap)
    grad2.copy_(window.fold(padded))
    return grad1, grad2


@_subtraction2_backward.register_fake
def _(
    grad: Tensor, height: int, width: int, channels_last: bool, *args: Any
) -> tuple[Tensor, Tensor]:
    return empty_gradients(grad, grad.shape[1], height, width, channels_last)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad1, grad2 = _subtraction2_backward(grad, *ctx.planes, *ctx.window)
    return grad1, grad2, *[None] * len(ctx.window)


_subtraction2.register_autograd(_differentiate, setup_context=save_planes)


@register_flop_formula(torch.ops.sanctl.subtraction2)
def _(*args: Any, out_shape: tuple[int, ...], **kwargs: Any) -> int:
    """One subtraction for every element of the output."""
    return math.prod(out_shape)


@register_flop_formula(torch.ops.sanctl.subtraction2_backward)
def _(grad_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Every element of the gradient is added once for x1 and once for x2."""
    return 2 * math.prod(grad_shape)
