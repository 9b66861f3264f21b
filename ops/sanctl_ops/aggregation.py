"""Weighted sums over windows, with weights that differ from pixel to pixel."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sanctl_ops.backend import runs_kernels
from sanctl_ops.checks import check_alike, check_image, check_weights, check_window
from sanctl_ops.kernels import aggregation as kernels
from sanctl_ops.window import Window, accumulation_dtype, plane_format


def aggregation(
    x: Tensor,
    w: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """Sum the taps of every window of x, each weighted by its own element of w.

    `out[n, c, i] = sum_j w[n, c % Cw, j, i] * x[n, c, nbr(i, j)]`, where nbr(i, j) is tap j of the
    window at output pixel i. This is the aggregation of self-attention with C / Cw channels
    sharing each weight (Zhao et al., CVPR 2020, equations 2 and 4). Sums of float16 and bfloat16
    values are kept in float32. Neither direction copies x once per tap.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64, in any memory layout.
        w: (N, Cw, K*K, P), where Cw divides C and the P = Ho * Wo windows run row by row; of the
            dtype and on the device of x.
        kernel_size: taps per side of the window, K.
        stride: pixels between neighbouring windows.
        padding: pixels added on each side of x before the windows slide.
        dilation: pixels between neighbouring taps.
        pad_mode: "reflect" (without repeating the border pixel) or "zero".

    Returns:
        (N, C, Ho, Wo), channels_last if x is, else contiguous. So is the gradient of x; that of w
        is contiguous.

    Raises:
        ValueError: a tensor is not 4-d or of another type, dtypes or devices differ, the shape of
            w does not fit, Cw does not divide C, kernel_size, stride or dilation is below 1,
            padding is negative, pad_mode is unknown, reflect padding is not smaller than the
            sides, or the window is larger than the padded input.
        BackendError: the CuPy kernels are asked for by name and cannot run on x's device.
    """
    check_image("x", x)
    check_alike("x", x, "w", w)
    window = Window(kernel_size, stride, padding, dilation, pad_mode)
    check_window(window, x)
    check_weights(window, x, w)
    return _aggregation(x, w, kernel_size, stride, padding, dilation, pad_mode)


@torch.library.custom_op("sanctl::aggregation", mutates_args=())
def _aggregation(
    x: Tensor,
    w: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    pad_mode: str,
) -> Tensor:
    window = Window(kernel_size, stride, padding, dilation, pad_mode)
    if not runs_kernels(x.device):
        return _weighted_sums(window, x, w).to(x.dtype, memory_format=plane_format(x))
    out = _empty_output(window, x)
    kernels.forward(window, x, w, out)
    return out


@_aggregation.register_fake
def _(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    return _empty_output(Window(*args), x)


def _empty_output(window: Window, x: Tensor) -> Tensor:
    shape = (*x.shape[:2], *window.output_size(*x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=plane_format(x))


def _weighted_sums(window: Window, x: Tensor, w: Tensor) -> Tensor:
    accumulate = accumulation_dtype(x.dtype)
    size = window.output_size(*x.shape[2:])
    values = _grouped(window.pad(x.to(accumulate)), w)
    out = torch.zeros((*x.shape[:2], *size), dtype=accumulate, device=x.device)
    for view, weight in zip(window.tap_views(values), _tap_weights(w, size), strict=True):
        _grouped(out, w).addcmul_(view, weight)
    return out


@torch.library.custom_op("sanctl::aggregation_backward", mutates_args=())
def _aggregation_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    pad_mode: str,
) -> tuple[Tensor, Tensor]:
    window = Window(kernel_size, stride, padding, dilation, pad_mode)
    if not runs_kernels(x.device):
        grad = grad.to(accumulation_dtype(x.dtype), memory_format=torch.contiguous_format)
        return _input_gradient(window, grad, x, w), _weight_gradient(window, grad, x, w)
    grad_x, grad_w = _empty_gradients(x, w)
    kernels.input_gradient(window, grad, w, grad_x)
    kernels.weight_gradient(window, grad, x, grad_w)
    return grad_x, grad_w


@_aggregation_backward.register_fake
def _(grad: Tensor, x: Tensor, w: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, w)


def _empty_gradients(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=plane_format(x))
    return grad_x, w.new_empty(w.shape)


def _input_gradient(window: Window, grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    grad_padded = grad.new_zeros(*x.shape[:2], *window.padded_size(*x.shape[2:]))
    views = window.tap_views(_grouped(grad_padded, w))
    for view, weight in zip(views, _tap_weights(w, grad.shape[2:]), strict=True):
        view.addcmul_(_grouped(grad, w), weight)
    return window.fold(grad_padded).to(x.dtype).contiguous(memory_format=plane_format(x))


def _weight_gradient(window: Window, grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Add up the groups one by one: a product over all of them would be as large as unfold's."""
    values = _grouped(window.pad(x.to(grad.dtype)), w)
    grad_weight = grad.new_zeros(w.shape)
    taps = grad_weight.view(*w.shape[:2], *[window.kernel_size] * 2, *grad.shape[2:])
    for value, grad_out in zip(values.unbind(1), _grouped(grad, w).unbind(1), strict=True):
        taps.addcmul_(window.views(value), grad_out[:, :, None, None])
    return grad_weight.to(w.dtype)


def _grouped(x: Tensor, w: Tensor) -> Tensor:
    """View (N, C, H, W) as (N, C // Cw, Cw, H, W): weight channel c % Cw serves channel c."""
    return x.unflatten(1, (x.shape[1] // w.shape[1], w.shape[1]))


def _tap_weights(w: Tensor, size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Split (N, Cw, K*K, P) into the taps' weights, each (N, 1, Cw, Ho, Wo)."""
    return w.unflatten(3, size)[:, None].unbind(3)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, *ctx.window = inputs
    ctx.save_for_backward(x, w)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_w = _aggregation_backward(grad, *ctx.saved_tensors, *ctx.window)
    return grad_x, grad_w, *[None] * len(ctx.window)


_aggregation.register_autograd(_differentiate, setup_context=_save_inputs)


def _flops(out_shape: tuple[int, ...], window: tuple[Any, ...]) -> int:
    return 2 * Window(*window).taps * math.prod(out_shape)


@register_flop_formula(torch.ops.sanctl.aggregation)
def _(x_shape: Any, w_shape: Any, *args: Any, out_shape: tuple[int, ...], **kwargs: Any) -> int:
    """A multiply-add, counted as 2, for every tap of every output element."""
    return _flops(out_shape, args)


@register_flop_formula(torch.ops.sanctl.aggregation_backward)
def _(grad_shape: tuple[int, ...], x_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The same number of multiply-adds for each of the two gradients."""
    return 2 * _flops(grad_shape, args)
