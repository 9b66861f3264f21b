"""Launches of pairwise_aggregate.cu, pairwise_sums_gradient.cu and pairwise_largest.cu."""

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels import pairwise_narrow
from sanctl_ops.kernels.geometry import VECTOR_BYTES, WARP, divisor_argument
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_saved import Saved
from sanctl_ops.kernels.pairwise_tiles import Tiles, slope_walk, value_walk
from sanctl_ops.kernels.runtime import Argument, kernel, launch

AGGREGATE = "pairwise_aggregate.cu"
GRADIENT = "pairwise_sums_gradient.cu"
LARGEST = "pairwise_largest.cu"
# Threads of a block that folds, or looks for the largest; several blocks of these for each
# multiprocessor of the largest GPUs.
THREADS = 256
LARGEST_BLOCKS = 1024


def rows_of(planes: Tensor) -> Tensor:
    """Return (N, H, W, C), dense and aligned for vectors; a view of channels_last planes."""
    rows = planes.movedim(1, -1).contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def pixels_of(planes: Tensor) -> Tensor:
    """Return (N, H, W, C), aligned for vectors; pixels may lie apart, at one distance all over."""
    rows = planes.movedim(1, -1)
    _, height, width, _ = rows.shape
    pitch = rows.stride(2)
    even = rows.stride() == (height * width * pitch, width * pitch, pitch, 1) and pitch % 8 == 0
    countable = height * width * pitch < 2**31
    return rows if even and countable and rows.data_ptr() % 16 == 0 else rows_of(planes)


def largest(rows: Tensor) -> Tensor:
    """Return the largest value of `pixels_of` planes, disregarding signs, (1,)."""
    channels, vector = rows.shape[3], VECTOR_BYTES // rows.itemsize
    count = rows.numel() // vector
    partials = torch.empty(min(LARGEST_BLOCKS, -(-count // THREADS)), device=rows.device)
    launch(
        kernel(LARGEST, "pairwise_largest", rows.dtype, vector),
        rows.device,
        partials.numel(),
        THREADS,
        (rows, partials, np.uint32(count), divisor_argument(channels // vector), rows.stride(2)),
        THREADS * partials.itemsize,
    )
    return partials.amax(0, keepdim=True)


def aggregate(value: Tensor, saved: Saved, layout: Layout) -> Tensor:
    """Return the weighted sums of the `pixels_of` values, (N, H, W, C)."""
    if pairwise_narrow.takes_values(layout):
        return pairwise_narrow.aggregate(value, saved, layout)
    cut, out = value_walk(layout), value.new_empty(value.shape)
    sums = (saved.logits, saved.log_sums, value, out, saved.most_value)
    _launch_sums(AGGREGATE, "pairwise_aggregate", layout, cut, value, sums, pitch=value.stride(2))
    return out


def logits_gradient(
    grad: Tensor, value: Tensor, out: Tensor, saved: Saved, most_slope: Tensor, layout: Layout
) -> Tensor:
    """Return the gradient of the natural logits, scaled; planes by rows, values by `pixels_of`."""
    if pairwise_narrow.takes_values(layout):
        return pairwise_narrow.logits_gradient(grad, value, out, saved, most_slope, layout)
    cut, grad_logits = value_walk(layout), torch.empty_like(saved.logits)
    most = (saved.most_value, most_slope)
    sums = (grad, saved.logits, saved.log_sums, value, out, grad_logits, *most)
    name = "pairwise_logits_gradient"
    _launch_sums(GRADIENT, name, layout, cut, value, sums, (layout.slots,), value.stride(2))
    return grad_logits


def value_gradient(grad: Tensor, saved: Saved, most_slope: Tensor, layout: Layout) -> Tensor:
    """Return the gradient of the values, by rows as grad is."""
    if pairwise_narrow.takes_values(layout):
        return pairwise_narrow.value_gradient(grad, saved, layout)
    cut, device = slope_walk(layout), grad.device
    padded = torch.empty(layout.images, *layout.padded, layout.channels, device=device)
    sums = (grad, saved.logits, saved.log_sums, padded, most_slope)
    _launch_sums(GRADIENT, "pairwise_value_gradient", layout, cut, grad, sums)
    folded = torch.empty_like(grad)
    launch(
        kernel(GRADIENT, "pairwise_fold", grad.dtype, layout.kernel_size),
        device,
        -(-folded.numel() // (8 * THREADS)),
        THREADS,
        (
            *(padded, folded, divisor_argument(layout.channels // 8)),
            *(divisor_argument(layout.width), divisor_argument(layout.height), layout.images),
        ),
    )
    return folded


def _launch_sums(
    source: str,
    name: str,
    layout: Layout,
    cut: Tiles,
    rows: Tensor,
    arguments: tuple[Argument, ...],
    known_slots: tuple[int, ...] = (),
    pitch: int | None = None,
) -> None:
    """Launch a kernel whose blocks take the channels of a slab of a tile.

    `known_slots` is a template's parameter; without it, the slots are an argument. `pitch` is an
    argument of those kernels that read values.
    """
    launch(
        kernel(source, name, rows.dtype, layout.blocks, layout.kernel_size, *known_slots),
        rows.device,
        layout.images * cut.of_image * layout.slabs,
        cut.warps * WARP,
        (
            *(*arguments, cut.argument, divisor_argument(layout.slabs)),
            *(*(() if known_slots else (layout.slots,)), layout.channels, layout.step),
            *(() if pitch is None else (pitch,)),
        ),
        cut.shared_bytes,
    )
