"""Differences between a window's centre and its taps, both in one tensor."""

from torch import Tensor

from sanctl_ops.subtraction2 import subtraction2


def subtraction(
    x: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """Subtract the taps of every window from its centre; `subtraction2(x, x, ...)`.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64, in any memory layout.
        kernel_size: taps per side of the window, K.
        stride: pixels between neighbouring windows.
        padding: pixels added on each side before the windows slide.
        dilation: pixels between neighbouring taps.
        pad_mode: "reflect" (without repeating the border pixel) or "zero".

    Returns:
        (N, C, K*K, P), contiguous; the P = Ho * Wo windows run row by row.

    Raises:
        ValueError: see `subtraction2`.
    """
    return subtraction2(x, x, kernel_size, stride, padding, dilation, pad_mode)
