"""Launches of aggregation_mma.cu and aggregation_mma_input.cu: 16-bit values on tensor cores."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import (
    WARP,
    deal_argument,
    divisor_argument,
    reflects,
    same_kernel_size,
    staged_vector,
    strides_argument,
    window_argument,
)
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES, Argument, Kernel, kernel, launch
from sanctl_ops.window import Window

SOURCE = "aggregation_mma.cu"
INPUT_SOURCE = "aggregation_mma_input.cu"
DTYPES = (torch.float16, torch.bfloat16)
# Weights that one access moves.
VECTORS = (8, 4)
INPUT_VECTORS = (8, 4, 2)
# Warps of a block, at most, for each number of rows that a warp may take at once.
MOST_WARPS = {1: 8, 2: 8, 4: 4}
INPUT_MOST_WARPS = {1: 16, 2: 18, 4: 5}
# The same where there is a choice.
INPUT_WARPS = {1: 8, 2: 18, 4: 5}
PASSES = 2  # times that a warp takes rows of windows to sum over, at most

# As in staged_tile.cuh and banded_mma.cuh.
CHANNELS = 8
PIXELS = 16
PRODUCTS = 4
SEGMENT = PRODUCTS * PIXELS

# As in aggregation_mma.cu.
MARGIN = 4
WEIGHT_PITCH = 72
AHEAD = 2

# As in aggregation_mma_input.cu.
INPUT_MARGIN = 8
INPUT_STAGES = 3
BEYOND = 72
INPUT_PRODUCTS = {1: PRODUCTS, 2: 3, 4: 2}


@dataclass(frozen=True)
class _Tiles:
    """How planes are cut into tiles, and these dealt out to warps.

    Attributes:
        height, width: sides of the planes.
        count: tiles of a plane.
        together: rows that one warp takes at once.
        segments: warps that share a row.
        rows: rows of a tile.
        step: rows that the warps of a block take at once.
        lines: lines of each channel in shared memory.
        pitch: elements of a line.
    """

    height: int
    width: int
    count: int
    together: int
    segments: int
    rows: int
    step: int
    lines: int
    pitch: int

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.step // self.together * self.segments

    @property
    def plane_pitch(self) -> int:
        """Elements of the lines of a channel.

        Products of rows and columns that do not exist read on for less than a segment, and beyond
        the last channel what is there may be on its way still. 16 bytes beyond a multiple of 128:
        the rows of a matrix, each of another channel, lie in different banks.
        """
        read = (self.lines + self.together - 1) * self.pitch + SEGMENT
        return -(-read // 64) * 64 + 8

    @property
    def pieces(self) -> tuple[int, ...]:
        """Numbers of pixels that warps take in one piece, and those of a plane."""
        rest = (self.height % self.rows % self.together, self.rows % self.together)
        return tuple(self.width * rows for rows in (self.together, *rest, self.height))


def forward(window: Window, x: Tensor, w: Tensor, out: Tensor) -> bool:
    """Write the weighted sums as `aggregation.forward` does; return False if these do not fit."""
    tiles = _window_tiles(window, x, PASSES)
    size = window.kernel_size
    slots = 4 if size == 7 else size
    ring = max(slots * size, AHEAD * size + CHANNELS) * WEIGHT_PITCH
    out_vector = _vector(out, tiles.pieces, INPUT_VECTORS) if out.stride(3) == 1 else None
    planes = (x, strides_argument(x), w, out, strides_argument(out))
    vectors = (staged_vector(x, MARGIN), out_vector or 1)
    return _launch_windows("aggregation_mma", window, tiles, x, w, planes, vectors, ring)


def weight_gradient(window: Window, grad: Tensor, x: Tensor, grad_w: Tensor) -> bool:
    """Write the gradient of w as `aggregation.weight_gradient` does; False if these do not fit."""
    tiles = _window_tiles(window, x, passes=1)
    own = (CHANNELS + 2 * window.kernel_size) * WEIGHT_PITCH
    planes = (grad, strides_argument(grad), x, strides_argument(x), grad_w)
    vectors = (staged_vector(x, MARGIN), staged_vector(grad, 8))
    name = "aggregation_weight_gradient_mma"
    return _launch_windows(name, window, tiles, x, grad_w, planes, vectors, own)


def _window_tiles(window: Window, x: Tensor, passes: int) -> _Tiles:
    """Return tiles of like height for kernels that sum over windows, or for windows' weights.

    Args:
        window: the windows.
        x: the planes.
        passes: times that a warp takes rows, at most.
    """
    height, width = x.shape[2:]
    products = -(-width // PIXELS)
    together = 4 if products == 1 else 2 if products == 2 else 1
    segments = -(-width // SEGMENT)
    at_once = max(1, MOST_WARPS[together] // segments) * together
    passes = min(passes, -(-height // at_once))
    count = -(-height // (at_once * passes))
    rows = -(-height // count)
    step = -(-rows // (passes * together)) * together
    pitch = (products + 1) * PIXELS
    lines = rows + window.kernel_size - 1
    return _Tiles(height, width, count, together, segments, rows, step, lines, pitch)


def _launch_windows(
    name: str,
    window: Window,
    tiles: _Tiles,
    x: Tensor,
    w: Tensor,
    planes: tuple[Argument, ...],
    vectors: tuple[int, int],
    own: int,
) -> bool:
    """Launch a kernel whose warps have `own` elements of shared memory each."""
    weights = _vector(w, tiles.pieces, VECTORS)
    if weights is None or not _fits(window, tiles, x, w):
        return False
    piece = min(SEGMENT, tiles.together * tiles.width)
    deal = _deal(tiles, x, w, -(-piece // weights), vectors[0])
    parameters = (x.dtype, reflects(window), window.kernel_size, weights, tiles.together)
    return _launch(
        kernel(SOURCE, name, *parameters),
        tiles,
        x,
        w,
        (
            *planes,
            window_argument(window, tiles.height, tiles.width),
            deal,
            divisor_argument(tiles.segments),
            tiles.step,
            *vectors,
        ),
        CHANNELS * tiles.plane_pitch + tiles.warps * own,
    )


def input_gradient(window: Window, grad: Tensor, w: Tensor, grad_x: Tensor) -> bool:
    """Write the gradient of x as `aggregation.input_gradient` does; False if these do not fit."""
    size, (height, width) = window.kernel_size, grad.shape[2:]
    tiles = _padded_tiles(grad, size)
    if tiles is None:
        return False
    staged = staged_vector(grad, INPUT_MARGIN)
    pieces = (height * width,) if tiles.count == 1 else (height * width, width)
    weights = _vector(w, pieces, INPUT_VECTORS)
    if weights is None or not _fits(window, tiles, grad, w):
        return False
    together = tiles.together
    rows_of_weights = min(height, tiles.rows)
    # An odd multiple of 16 bytes: the diagonals of a band lie in different banks.
    tap_pitch = (-(-(INPUT_MARGIN + rows_of_weights * width) // 8) | 1) * 8
    ring = INPUT_STAGES * (size * tap_pitch + BEYOND)
    columns = max(INPUT_PRODUCTS[together] * PIXELS, tiles.segments * SEGMENT)
    lines = tiles.warps // tiles.segments * together * CHANNELS
    sums = lines * (columns + 4) * 4 // w.itemsize
    out_vector = staged_vector(grad_x, 8)
    deal = _deal(tiles, grad, w, 1, staged)
    parameters = (grad.dtype, reflects(window), size, weights, together)
    planes = (grad, strides_argument(grad), w, grad_x, strides_argument(grad_x))
    written = divisor_argument(width // out_vector)
    segments = divisor_argument(tiles.segments)
    shape = (window_argument(window, height, width), deal, segments, written)
    return _launch(
        kernel(INPUT_SOURCE, "aggregation_input_gradient_mma", *parameters),
        tiles,
        grad,
        w,
        (*planes, *shape, staged, out_vector, tap_pitch, ring),
        max(CHANNELS * tiles.plane_pitch + ring, sums),
    )


def _padded_tiles(x: Tensor, kernel_size: int) -> _Tiles | None:
    """Return tiles of the padded planes, or None where there are too many rows or columns to each.

    Those at a border have what lies on padding and all that it reflects, 2 * (K // 2) + 1 rows.
    """
    height, width = x.shape[2:]
    around = kernel_size // 2 * 2
    columns = width + around
    together = next(n for n in (4, 2, 1) if INPUT_PRODUCTS[n] * PIXELS >= columns or n == 1)
    segments = -(-columns // SEGMENT)
    for count in range(1, max((height + around) // (around + 1), 1) + 1):
        rows = -(-(height + around) // count)
        step = -(-rows // together) * together
        warps = step // together * segments
        if warps <= INPUT_WARPS[together]:
            break
    if warps > INPUT_MOST_WARPS[together]:
        return None
    pitch = -(-columns // PIXELS) * PIXELS + PIXELS
    # One line more, which stays zero.
    lines = rows + kernel_size
    return _Tiles(height, width, count, together, segments, rows, step, lines, pitch)


def _fits(window: Window, tiles: _Tiles, x: Tensor, w: Tensor) -> bool:
    """Tell whether the kernels take planes x with weights w."""
    _, group = _channels(x, w)
    return (
        same_kernel_size(window) > 0
        and w.dtype in DTYPES
        and w.is_contiguous()
        and group <= CHANNELS
        and tiles.segments <= MOST_WARPS[1]
        and window.taps * w.shape[3] < 2**31
    )


def _channels(x: Tensor, w: Tensor) -> tuple[int, int]:
    """Return the channels of the weights, and how many of x share one."""
    return w.shape[1], x.shape[1] // w.shape[1]


def _vector(x: Tensor, pieces: tuple[int, ...], vectors: tuple[int, ...]) -> int | None:
    """Return how many elements one access to a tensor may move: what divides all pieces of it."""
    for vector in vectors:
        divides = all(piece % vector == 0 for piece in pieces)
        if divides and x.data_ptr() % (vector * x.itemsize) == 0:
            return vector
    return None


def _deal(tiles: _Tiles, x: Tensor, w: Tensor, vectors: int, staged: int) -> np.ndarray:
    """Return struct Deal, for so many accesses to the weights of a tap and pixels of a copy."""
    weight_channels, group = _channels(x, w)
    return deal_argument(
        tiles.count,
        weight_channels,
        vectors,
        tiles.pitch // staged,
        rows=tiles.rows,
        group=group,
        pitch=tiles.pitch,
        plane_pitch=tiles.plane_pitch,
    )


def _launch(
    instance: Kernel,
    tiles: _Tiles,
    x: Tensor,
    w: Tensor,
    arguments: tuple[Argument, ...],
    elements: int,
) -> bool:
    """Launch a kernel; return False if its elements in shared memory are more than there are."""
    shared = elements * x.itemsize
    if shared > MOST_SHARED_BYTES:
        return False
    blocks = x.shape[0] * w.shape[1] * tiles.count
    launch(instance, x.device, blocks, tiles.warps * WARP, arguments, shared)
    return True
