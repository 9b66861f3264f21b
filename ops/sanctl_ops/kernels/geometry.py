"""What the kernels of windows have in common: structures, vector widths, grids."""

from functools import cache, cached_property
from typing import Any

import numpy as np
from torch import Tensor

from sanctl_ops.window import Window

# As struct Window, struct Strides and struct Divisor in window.cuh.
WINDOW = np.dtype(
    [
        (name, np.int32)
        for name in (
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "height",
            "width",
            "out_height",
            "out_width",
        )
    ]
)
STRIDES = np.dtype([(name, np.int64) for name in "nchw"])
DIVISOR = np.dtype([(name, np.uint32) for name in ("divisor", "multiplier", "shift")])

# As struct Deal in staged_tile.cuh.
DEAL = np.dtype(
    [(name, DIVISOR) for name in ("tiles", "weight_channels", "vectors", "units")]
    + [(name, np.int32) for name in ("rows", "group", "pitch", "plane_pitch")]
)

SAME_KERNEL_SIZES = (3, 5, 7)
VECTOR_BYTES = 16
WARP = 32


class Structure(np.ndarray):
    """An array whose address NumPy works out once: CuPy asks for it at every launch."""

    @cached_property
    def __array_interface__(self) -> dict[str, Any]:
        return super().__array_interface__


def structure(values: tuple[Any, ...], layout: np.dtype) -> Structure:
    """Return a structure as bytes: NumPy describes fields anew, in Python, for every address."""
    return np.array(values, layout).view(f"V{layout.itemsize}").view(Structure)


@cache
def window_argument(window: Window, height: int, width: int) -> np.ndarray:
    """Return struct Window of `window` on planes of `height` x `width` pixels."""
    out_height, out_width = window.output_size(height, width)
    fields = (window.kernel_size, window.stride, window.padding, window.dilation)
    return structure((*fields, height, width, out_height, out_width), WINDOW)


@cache
def _strides(strides: tuple[int, ...]) -> np.ndarray:
    return structure(strides, STRIDES)


def strides_argument(x: Tensor) -> np.ndarray:
    """Return struct Strides of a 4-d tensor."""
    return _strides(x.stride())


def divisor(number: int) -> tuple[int, int, int]:
    """Return the fields of struct Divisor of a number from 1 to 2**31."""
    bits = (number - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << bits) - number)) // number + 1
    return number, multiplier, max(bits - 1, 0)


@cache
def divisor_argument(number: int) -> np.ndarray:
    """Return struct Divisor of a number from 1 to 2**31."""
    return structure(divisor(number), DIVISOR)


@cache
def deal_argument(
    tiles: int,
    weight_channels: int,
    vectors: int,
    units: int,
    *,
    rows: int,
    group: int,
    pitch: int,
    plane_pitch: int,
) -> np.ndarray:
    """Return struct Deal, whose first four numbers are divisors."""
    divisors = map(divisor, (tiles, weight_channels, vectors, units))
    return structure((*divisors, rows, group, pitch, plane_pitch), DEAL)


def staged_vector(x: Tensor, widest: int) -> int:
    """Return how many pixels of a row one copy of these planes may move, at most `widest`."""
    return vector_width(x.shape[3], x, widest=widest) if x.stride(3) == 1 else 1


def reflects(window: Window) -> bool:
    """Tell whether the windows' padding mirrors pixels, a template parameter of every kernel."""
    return window.pad_mode == "reflect"


def same_kernel_size(window: Window) -> int:
    """Return K for windows that the kernels `*_same` take, and 0 for all others.

    They have K = 3, 5 or 7, stride 1, no dilation, and padding K // 2, so that there is a window
    for every pixel.
    """
    k = window.kernel_size
    same = window.stride == 1 and window.dilation == 1 and window.padding == k // 2
    return k if same and k in SAME_KERNEL_SIZES else 0


def vector_width(width: int, *tensors: Tensor, widest: int = 4) -> int:
    """Return how many pixels of a row one access may move: a power of two up to `widest`.

    It divides the row, moves at most 16 bytes, and keeps the accesses to all `tensors` aligned.
    """
    for vector in (v for v in (8, 4, 2) if v <= widest):
        if width % vector == 0 and all(_aligned(x, vector) for x in tensors):
            return vector
    return 1


def _aligned(x: Tensor, vector: int) -> bool:
    """Tell whether rows can be read `vector` pixels at a time (or are read one by one anyway)."""
    if vector * x.itemsize > VECTOR_BYTES:
        return False
    if x.stride(-1) != 1:
        return True
    starts = x.data_ptr() % (vector * x.itemsize) == 0
    steps = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return starts and all(size == 1 or stride % vector == 0 for size, stride in steps)


def joined_pitch(width: int, kernel_size: int, vector: int) -> int:
    """Return the elements of a line that joins sums of padded columns (window_gradient.cuh)."""
    return width + -(-(kernel_size - 1) // vector) * vector


def threads_for(items: int, most: int) -> int:
    """Return threads of a block, whole warps, for up to `most` items each with its own thread."""
    chunks = -(-items // most)
    each = -(-items // max(chunks, 1))
    return max(WARP, -(-each // WARP) * WARP)


def rows_of_tile(height: int, vectors: int, most: int) -> int:
    """Return the rows of a tile: at most `most` vectors in it, the tiles being of like height."""
    tiles = -(-height // max(1, most // vectors))
    return -(-height // tiles)
