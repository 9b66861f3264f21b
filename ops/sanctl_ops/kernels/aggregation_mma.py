"""Launches of aggregation_mma.cu: 16-bit values on tensor cores."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import (
    reflects,
    same_kernel_size,
    strides_argument,
    vector_width,
    window_argument,
)
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES, Argument, kernel, launch
from sanctl_ops.window import Window

SOURCE = "aggregation_mma.cu"
DTYPES = (torch.float16, torch.bfloat16)
VECTORS = (8, 4)
MOST_WARPS = 8

# As in banded_mma.cuh and aggregation_mma.cu.
CHANNELS = 8
PIXELS = 16
PRODUCTS = 4
SEGMENT = PRODUCTS * PIXELS
STAGES = 3
WEIGHT_PITCH = 72
GRADIENT_PITCH = 88
VECTORS_OF_WARP = 64
# Weights in a row of taps that a warp copies at most: those of its pixels, and for the gradient of
# the input those around them, too, from one vector's start to another's end.
LONGEST_PIECE = SEGMENT
LONGEST_GRADIENT_PIECE = SEGMENT + 16


@dataclass(frozen=True)
class _Plan:
    """How the work on one layer is dealt out.

    Attributes:
        window: the windows.
        kernel_size: K.
        weight_vector: weights that one copy moves.
        plane_vector: pixels that one access moves when planes are staged.
        weight_channels: channels of the weights.
        group: channels that share a weight.
        rows: rows of a tile.
        together: rows that one warp takes.
        warps: warps of a block.
        pitch: elements of a staged line.
        plane_pitch: elements of the staged lines of a channel.
    """

    window: Window
    kernel_size: int
    weight_vector: int
    plane_vector: int
    weight_channels: int
    group: int
    rows: int
    together: int
    warps: int
    pitch: int
    plane_pitch: int


def forward(window: Window, x: Tensor, w: Tensor, out: Tensor) -> bool:
    """Write the weighted sums as `aggregation.forward` does; return False if these do not fit."""
    plan = _plan(window, x.shape[3], True, w, x)
    if plan is None:
        return False
    ring = STAGES * plan.kernel_size * WEIGHT_PITCH
    elements = CHANNELS * plan.plane_pitch + plan.warps * ring
    planes = (x, strides_argument(x), w, out, strides_argument(out))
    return _launch("aggregation_mma", plan, x, planes, elements)


def weight_gradient(window: Window, grad: Tensor, x: Tensor, grad_w: Tensor) -> bool:
    """Write the gradient of w as `aggregation.weight_gradient` does; False if these do not fit."""
    plan = _plan(window, x.shape[3], True, grad_w, x)
    if plan is None:
        return False
    taps = plan.kernel_size * WEIGHT_PITCH
    elements = CHANNELS * plan.plane_pitch + plan.warps * taps
    planes = (grad, strides_argument(grad), x, strides_argument(x), grad_w)
    return _launch("aggregation_weight_gradient_mma", plan, x, planes, elements)


def input_gradient(window: Window, grad: Tensor, w: Tensor, grad_x: Tensor) -> bool:
    """Write the gradient of x as `aggregation.input_gradient` does; False if these do not fit."""
    padded = grad.shape[3] + 2 * window.padding
    plan = _plan(window, padded, False, w, grad)
    if plan is None:
        return False
    ring = STAGES * plan.kernel_size * GRADIENT_PITCH
    floats = plan.rows * CHANNELS * (-(-padded // SEGMENT) * SEGMENT + 4)
    elements = CHANNELS * plan.plane_pitch + max(plan.warps * ring, 2 * floats)
    planes = (grad, strides_argument(grad), w, grad_x, strides_argument(grad_x))
    return _launch("aggregation_input_gradient_mma", plan, grad, planes, elements)


def _plan(
    window: Window, columns: int, join_rows: bool, w: Tensor, *planes: Tensor
) -> _Plan | None:
    """Return how the kernels take these tensors, or None where they do not.

    Args:
        window: the windows.
        columns: columns of sums in a row, 16 of which make one product.
        join_rows: whether a warp may take several short rows.
        w: the weights or their gradient.
        planes: what is staged, the first of them with the channels that share the weights.
    """
    size = same_kernel_size(window)
    group = planes[0].shape[1] // w.shape[1]
    segments = -(-columns // SEGMENT)
    fits = group <= CHANNELS and segments <= MOST_WARPS and window.taps * w.shape[3] < 2**31
    if not size or w.dtype not in DTYPES or not w.is_contiguous() or not fits:
        return None
    height, width = planes[0].shape[2:]
    together = max(1, PRODUCTS // 2 ** math.ceil(math.log2(-(-columns // PIXELS))))
    together = together if join_rows else 1
    tiles = -(-height // (MOST_WARPS // segments * together))
    rows = -(-height // tiles)
    warps = -(-rows // together) * segments
    pitch = -(-columns // PIXELS) * PIXELS + PIXELS
    # 16 bytes beyond a multiple of 128: the rows of a matrix lie in different banks.
    plane_pitch = -(-(rows + size - 1) * pitch // 64) * 64 + 8
    plane_vector = vector_width(width, *planes, widest=8)
    longest = LONGEST_PIECE if join_rows else LONGEST_GRADIENT_PIECE
    pieces = [width * n for n in (together, height % rows % together, rows % together)]
    weight_vector = _weight_vector(w, pieces, size * min(pieces[0], longest))
    if width // plane_vector > warps * 32 or weight_vector is None:
        return None
    return _Plan(
        window,
        size,
        weight_vector,
        plane_vector,
        w.shape[1],
        group,
        rows,
        together,
        warps,
        pitch,
        plane_pitch,
    )


def _weight_vector(w: Tensor, pieces: list[int], row_of_taps: int) -> int | None:
    """Return how many weights one copy may move, if a warp can copy a row of taps at once.

    Args:
        w: the weights.
        pieces: lengths of what a warp copies of one tap.
        row_of_taps: what it copies at most of a row of taps.
    """
    for vector in VECTORS:
        divides = all(piece % vector == 0 for piece in (*pieces, w.shape[3]))
        aligned = w.data_ptr() % (vector * w.itemsize) == 0
        if divides and aligned and row_of_taps <= vector * VECTORS_OF_WARP:
            return vector
    return None


def _launch(name: str, plan: _Plan, x: Tensor, planes: tuple[Argument, ...], elements: int) -> bool:
    shared = elements * x.itemsize
    if shared > MOST_SHARED_BYTES:
        return False
    batch, _, height, width = x.shape
    tiles = -(-height // plan.rows)
    launch(
        kernel(SOURCE, name, x.dtype, reflects(plan.window), plan.kernel_size, plan.weight_vector),
        x.device,
        batch * plan.weight_channels * tiles,
        plan.warps * 32,
        (
            *planes,
            window_argument(plan.window, height, width),
            plan.weight_channels,
            plan.group,
            tiles,
            plan.rows,
            plan.together,
            plan.plane_vector,
            plan.pitch,
            plan.plane_pitch,
        ),
        shared,
    )
    return True
