"""Launches of aggregation_mma.cu: 16-bit values on tensor cores."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import (
    WARP,
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
# Vectors of the weights for each number of rows that a warp of the gradient of the input may take.
GRADIENT_VECTORS = {1: (8, 4), 2: (8, 4, 2), 4: (8, 4, 2)}
MOST_WARPS = 8

# As in banded_mma.cuh and aggregation_mma.cu.
CHANNELS = 8
PIXELS = 16
PRODUCTS = 4
SEGMENT = PRODUCTS * PIXELS
STAGES = 3
WEIGHT_PITCH = 72
GRADIENT_PITCHES = {1: 88, 2: 136, 4: 136}
GRADIENT_PRODUCTS = {1: PRODUCTS, 2: 3, 4: 2}


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
    plan = _window_plan(window, w, x)
    if plan is None:
        return False
    ring = STAGES * plan.kernel_size * WEIGHT_PITCH
    elements = CHANNELS * plan.plane_pitch + plan.warps * ring
    planes = (x, strides_argument(x), w, out, strides_argument(out))
    return _launch("aggregation_mma", plan, x, planes, (plan.together,), elements)


def weight_gradient(window: Window, grad: Tensor, x: Tensor, grad_w: Tensor) -> bool:
    """Write the gradient of w as `aggregation.weight_gradient` does; False if these do not fit."""
    plan = _window_plan(window, grad_w, x)
    if plan is None:
        return False
    taps = plan.kernel_size * WEIGHT_PITCH
    elements = CHANNELS * plan.plane_pitch + plan.warps * taps
    planes = (grad, strides_argument(grad), x, strides_argument(x), grad_w)
    return _launch("aggregation_weight_gradient_mma", plan, x, planes, (plan.together,), elements)


def input_gradient(window: Window, grad: Tensor, w: Tensor, grad_x: Tensor) -> bool:
    """Write the gradient of x as `aggregation.input_gradient` does; False if these do not fit."""
    width = grad.shape[3]
    padded = width + 2 * window.padding
    together = 4 if width <= SEGMENT // 4 else 2 if width <= SEGMENT // 2 else 1
    while GRADIENT_PRODUCTS[together] * PIXELS < padded and together > 1:
        together //= 2
    # The line beyond the tile stays zero.
    plan = _plan(window, padded, together, 1, w, grad)
    vector = _weight_vector(w, [width], GRADIENT_VECTORS[together])
    if plan is None or vector is None:
        return False
    plan = replace(plan, weight_vector=vector)
    ring = STAGES * plan.kernel_size * GRADIENT_PITCHES[together]
    columns = max(GRADIENT_PRODUCTS[together] * PIXELS, -(-padded // SEGMENT) * SEGMENT)
    floats = -(-plan.rows // together) * together * CHANNELS * (columns + 4)
    elements = CHANNELS * plan.plane_pitch + max(plan.warps * ring, 2 * floats)
    planes = (grad, strides_argument(grad), w, grad_x, strides_argument(grad_x))
    return _launch("aggregation_input_gradient_mma", plan, grad, planes, (), elements, together)


def _window_plan(window: Window, w: Tensor, x: Tensor) -> _Plan | None:
    """Return how windows of x are summed, or None where the kernels do not take these tensors."""
    height, width = x.shape[2:]
    products = 2 ** math.ceil(math.log2(-(-width // PIXELS)))
    together = max(1, PRODUCTS // products)
    plan = _plan(window, width, together, 0, w, x)
    if plan is None:
        return None
    pieces = [width * n for n in (together, height % plan.rows % together, plan.rows % together)]
    vector = _weight_vector(w, pieces, VECTORS)
    return replace(plan, weight_vector=vector) if vector else None


def _plan(
    window: Window, columns: int, together: int, more_lines: int, w: Tensor, x: Tensor
) -> _Plan | None:
    """Return a plan but for the vectors of weights, or None where the kernels do not take these.

    Args:
        window: the windows.
        columns: columns of sums in a row, 16 of which make one product.
        together: rows that a warp takes.
        more_lines: lines to stage beside those that the windows of a tile reach.
        w: the weights or their gradient.
        x: what is staged, with the channels that share the weights.
    """
    size = same_kernel_size(window)
    group = x.shape[1] // w.shape[1]
    segments = -(-columns // SEGMENT)
    fits = group <= CHANNELS and segments <= MOST_WARPS and window.taps * w.shape[3] < 2**31
    if not size or w.dtype not in DTYPES or not w.is_contiguous() or not fits:
        return None
    height, width = x.shape[2:]
    tiles = -(-height // (MOST_WARPS // segments * together))
    rows = -(-height // tiles)
    warps = -(-rows // together) * segments
    pitch = -(-columns // PIXELS) * PIXELS + PIXELS
    # 16 bytes beyond a multiple of 128: the rows of a matrix lie in different banks.
    plane_pitch = -(-(rows + size - 1 + more_lines) * pitch // 64) * 64 + 8
    plane_vector = vector_width(width, x, widest=8)
    if width // plane_vector > warps * WARP:
        return None
    return _Plan(
        window, size, 1, plane_vector, w.shape[1], group, rows, together, warps, pitch, plane_pitch
    )


def _weight_vector(w: Tensor, pieces: list[int], vectors: tuple[int, ...]) -> int | None:
    """Return how many weights one copy may move: what divides the pieces that a warp copies."""
    for vector in vectors:
        divides = all(piece % vector == 0 for piece in (*pieces, w.shape[3]))
        if divides and w.data_ptr() % (vector * w.itemsize) == 0:
            return vector
    return None


def _launch(
    name: str,
    plan: _Plan,
    x: Tensor,
    planes: tuple[Argument, ...],
    extra: tuple[int, ...],
    elements: int,
    *parameters: int,
) -> bool:
    """Launch a kernel; return False if its elements in shared memory are more than there are."""
    shared = elements * x.itemsize
    if shared > MOST_SHARED_BYTES:
        return False
    batch, _, height, width = x.shape
    tiles = -(-height // plan.rows)
    vector, mirrored = plan.weight_vector, reflects(plan.window)
    sizes = (plan.weight_channels, plan.group, tiles, plan.rows, *extra)
    launch(
        kernel(SOURCE, name, x.dtype, mirrored, plan.kernel_size, vector, *parameters),
        x.device,
        batch * plan.weight_channels * tiles,
        plan.warps * WARP,
        (
            *planes,
            window_argument(plan.window, height, width),
            *sizes,
            plan.plane_vector,
            plan.pitch,
            plan.plane_pitch,
        ),
        shared,
    )
    return True
