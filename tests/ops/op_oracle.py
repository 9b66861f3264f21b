"""The operators by their definition: float64 loops over windows and taps, and nothing of torch.

The neighbour of a tap is found by index arithmetic on the unpadded plane, so that padding, its
adjoint and the windows' views, which the operators build on, are all checked independently.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pixel = tuple[int, int] | None


class Geometry(NamedTuple):
    kernel_size: int
    stride: int
    padding: int
    dilation: int
    pad_mode: str


class Tap(NamedTuple):
    window: int
    tap: int
    neighbour: Pixel
    centre: Pixel


def output_size(height: int, width: int, geometry: Geometry) -> tuple[int, int]:
    """Count the windows down and across by placing them one after another."""

    def count(side: int) -> int:
        last = (geometry.kernel_size - 1) * geometry.dilation
        starts = range(0, side + 2 * geometry.padding - last, geometry.stride)
        return len(starts)

    return count(height), count(width)


def reflected(position: int, side: int) -> int:
    """Mirror a position about the first and the last pixel of a side, neither repeated."""
    if position < 0:
        return -position
    return 2 * (side - 1) - position if position >= side else position


def locate(row: int, column: int, height: int, width: int, pad_mode: str) -> Pixel:
    """Return the pixel that a position in the padded plane stands for; None for a zero."""
    inside = 0 <= row < height and 0 <= column < width
    if pad_mode == "zero":
        return (row, column) if inside else None
    return reflected(row, height), reflected(column, width)


def walk(height: int, width: int, geometry: Geometry) -> Iterator[Tap]:
    """Yield every tap of every window of a plane."""
    k, stride, padding, dilation, pad_mode = geometry
    middle = (k - 1) // 2 * dilation
    rows, columns = output_size(height, width, geometry)
    for window in range(rows * columns):
        top = window // columns * stride - padding
        left = window % columns * stride - padding
        centre = locate(top + middle, left + middle, height, width, pad_mode)
        for tap in range(k * k):
            row, column = top + tap // k * dilation, left + tap % k * dilation
            yield Tap(window, tap, locate(row, column, height, width, pad_mode), centre)


def subtraction2(x1: Array, x2: Array, geometry: Geometry) -> Array:
    batch, channels, height, width = x1.shape
    rows, columns = output_size(height, width, geometry)
    out = np.zeros((batch, channels, geometry.kernel_size**2, rows * columns))
    for window, tap, neighbour, centre in walk(height, width, geometry):
        if centre is not None:
            out[:, :, tap, window] += x1[:, :, *centre]
        if neighbour is not None:
            out[:, :, tap, window] -= x2[:, :, *neighbour]
    return out


def subtraction2_gradients(
    x1: Array, x2: Array, grad: Array, geometry: Geometry
) -> tuple[Array, Array]:
    grad1, grad2 = np.zeros_like(x1), np.zeros_like(x2)
    for window, tap, neighbour, centre in walk(x1.shape[2], x1.shape[3], geometry):
        if centre is not None:
            grad1[:, :, *centre] += grad[:, :, tap, window]
        if neighbour is not None:
            grad2[:, :, *neighbour] -= grad[:, :, tap, window]
    return grad1, grad2


def concatenation(x1: Array, x2: Array, geometry: Geometry) -> Array:
    batch, channels, height, width = x1.shape
    rows, columns = output_size(height, width, geometry)
    taps = geometry.kernel_size**2
    out = np.zeros((batch, channels * (taps + 1), 1, rows * columns))
    for window, tap, neighbour, centre in walk(height, width, geometry):
        for channel in range(channels):
            if centre is not None:
                out[:, channel, 0, window] = x1[:, channel, *centre]
            if neighbour is not None:
                place = channels + channel * taps + tap
                out[:, place, 0, window] = x2[:, channel, *neighbour]
    return out


def concatenation_gradients(
    x1: Array, x2: Array, grad: Array, geometry: Geometry
) -> tuple[Array, Array]:
    grad1, grad2 = np.zeros_like(x1), np.zeros_like(x2)
    channels, taps = x1.shape[1], geometry.kernel_size**2
    for window, tap, neighbour, centre in walk(x1.shape[2], x1.shape[3], geometry):
        for channel in range(channels):
            if centre is not None and tap == 0:  # once for a window
                grad1[:, channel, *centre] += grad[:, channel, 0, window]
            if neighbour is not None:
                place = channels + channel * taps + tap
                grad2[:, channel, *neighbour] += grad[:, place, 0, window]
    return grad1, grad2


def aggregation(x: Array, w: Array, geometry: Geometry) -> Array:
    batch, channels, height, width = x.shape
    rows, columns = output_size(height, width, geometry)
    shared = np.arange(channels) % w.shape[1]
    out = np.zeros((batch, channels, rows * columns))
    for window, tap, neighbour, _ in walk(height, width, geometry):
        if neighbour is not None:
            out[:, :, window] += w[:, shared, tap, window] * x[:, :, *neighbour]
    return out.reshape(batch, channels, rows, columns)


def aggregation_gradients(
    x: Array, w: Array, grad: Array, geometry: Geometry
) -> tuple[Array, Array]:
    grad_x, grad_w = np.zeros_like(x), np.zeros_like(w)
    flat = grad.reshape(*grad.shape[:2], w.shape[3])
    for window, tap, neighbour, _ in walk(x.shape[2], x.shape[3], geometry):
        if neighbour is None:
            continue
        for channel in range(x.shape[1]):
            shared = channel % w.shape[1]
            out = flat[:, channel, window]
            grad_x[:, channel, *neighbour] += w[:, shared, tap, window] * out
            grad_w[:, shared, tap, window] += x[:, channel, *neighbour] * out
    return grad_x, grad_w
