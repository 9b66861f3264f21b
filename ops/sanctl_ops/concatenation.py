"""A window's centre in one tensor and all its taps in another, side by side as channels."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sanctl_ops.backend import runs_kernels
from sanctl_ops.kernels import concatenation as kernels
from sanctl_ops.relation import check_related, empty_gradients, save_planes
from sanctl_ops.window import Window, accumulation_dtype


def concatenation(
    x1: Tensor,
    x2: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """Join the centres of the windows in x1 and all taps of the windows in x2, as channels.

    `out[n, c, 0, i] = x1[n, c, centre(i)]` for the first C channels, then
    `out[n, C + c * K*K + j, 0, i] = x2[n, c, nbr(i, j)]`, with centre(i) and nbr(i, j) as in
    `subtraction2`. This is the relation of patchwise self-attention (Zhao et al., CVPR 2020,
    section 3.2).

    Args:
        x1: (N, C, H, W), float16, bfloat16, float32 or float64, in any memory layout.
        x2: like x1: same shape, dtype and device.
        kernel_size: taps per side of the window, K.
        stride: pixels between neighbouring windows.
        padding: pixels added on each side of both tensors before the windows slide.
        dilation: pixels between neighbouring taps.
        pad_mode: "reflect" (without repeating the border pixel) or "zero".

    Returns:
        (N, C * (K*K + 1), 1, P), contiguous; the P = Ho * Wo windows run row by row. The gradients
        of x1 and x2 are channels_last if x1 is, else contiguous.

    Raises:
        ValueError: see `subtraction2`.
        BackendError: the CuPy kernels are asked for by name and cannot run on x1's device.
    """
    check_related(Window(kernel_size, stride, padding, dilation, pad_mode), x1, x2)
    return _concatenation(x1, x2, kernel_size, stride, padding, dilation, pad_mode)


@torch.library.custom_op("sanctl::concatenation", mutates_args=())
def _concatenation(
    x1: Tensor,
    x2: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    pad_mode: str,
) -> Tensor:
    window = Window(kernel_size, stride, padding, dilation, pad_mode)
    out = _empty_output(window, x1)
    if runs_kernels(x1.device):
        kernels.forward(window, x1, x2, out)
        return out
    centres, taps = _parts(window, out, *window.output_size(*x1.shape[2:]))
    centres.copy_(window.centre_view(window.pad(x1)))
    taps.copy_(window.views(window.pad(x2)))
    return out


@_concatenation.register_fake
def _(x1: Tensor, x2: Tensor, *args: Any) -> Tensor:
    return _empty_output(Window(*args), x1)


def _empty_output(window: Window, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out_height, out_width = window.output_size(height, width)
    return x.new_empty(batch, channels * (window.taps + 1), 1, out_height * out_width)


def _channels(window: Window, joined: Tensor) -> int:
    """Return C of a joined (N, C * (K*K + 1), 1, P)."""
    return joined.shape[1] // (window.taps + 1)


def _parts(window: Window, joined: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """View the centres as (N, C, Ho, Wo) and the taps as (N, C, K, K, Ho, Wo)."""
    channels = _channels(window, joined)
    pixels = joined[:, :, 0].unflatten(2, (rows, columns))
    taps = pixels[:, channels:].unflatten(1, (channels, *[window.kernel_size] * 2))
    return pixels[:, :channels], taps


@torch.library.custom_op("sanctl::concatenation_backward", mutates_args=())
def _concatenation_backward(
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
    grad1, grad2 = empty_gradients(grad, _channels(window, grad), height, width, channels_last)
    if runs_kernels(grad.device):
        kernels.backward(window, grad, grad1, grad2)
        return grad1, grad2
    centres, taps = _parts(window, grad, *window.output_size(height, width))
    padded = torch.zeros(
        (*grad1.shape[:2], *window.padded_size(height, width)),
        dtype=accumulation_dtype(grad.dtype),
        device=grad.device,
    )
    window.centre_view(padded).copy_(centres)
    grad1.copy_(window.fold(padded))
    grad2.copy_(window.fold(_scattered_taps(window, taps, padded.zero_())))
    return grad1, grad2


@_concatenation_backward.register_fake
def _(
    grad: Tensor, height: int, width: int, channels_last: bool, *args: Any
) -> tuple[Tensor, Tensor]:
    return empty_gradients(grad, _channels(Window(*args), grad), height, width, channels_last)


def _scattered_taps(window: Window, taps: Tensor, padded: Tensor) -> Tensor:
    """Add taps (N, C, K, K, Ho, Wo) to the pixels of `padded`, a column and then a row at a time.

    So K + K additions do instead of K * K.
    """
    batch, channels, size, _, rows, _ = taps.shape
    lines = padded.new_zeros(batch, channels, size, rows, padded.shape[3])
    for view, column in zip(_places(window, lines, -1), taps.unbind(3), strict=True):
        view.add_(column)
    for view, row in zip(_places(window, padded, -2), lines.unbind(2), strict=True):
        view.add_(row)
    return padded


def _places(window: Window, padded: Tensor, dim: int) -> tuple[Tensor, ...]:
    """View along one side what each of the K taps reads."""
    return padded.unfold(dim, window.span, window.stride)[..., :: window.dilation].unbind(-1)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad1, grad2 = _concatenation_backward(grad, *ctx.planes, *ctx.window)
    return grad1, grad2, *[None] * len(ctx.window)


_concatenation.register_autograd(_differentiate, setup_context=save_planes)


@register_flop_formula(torch.ops.sanctl.concatenation)
def _(*args: Any, **kwargs: Any) -> int:
    """Values are only copied."""
    return 0


@register_flop_formula(torch.ops.sanctl.concatenation_backward)
def _(grad_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Every element of the gradient is added once."""
    return math.prod(grad_shape)
