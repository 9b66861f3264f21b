"""Launches that subtraction2.cu and concatenation.cu share: both relate two planes."""

import numpy as np
from torch import Tensor

from sanctl_ops.kernels.geometry import (
    divisor_argument,
    joined_pitch,
    reflects,
    rows_of_tile,
    same_kernel_size,
    strides_argument,
    threads_for,
    vector_width,
    window_argument,
)
from sanctl_ops.kernels.runtime import kernel, launch
from sanctl_ops.window import Window, accumulation_dtype

THREADS = 256
SAME_THREADS = 128


def forward(source: str, name: str, window: Window, x1: Tensor, x2: Tensor, out: Tensor) -> None:
    """Write the relation of x1 and x2, (N, C, H, W) in any layout, into `out`, contiguous."""
    batch, channels, height, width = x1.shape
    windows = out.shape[3]
    size = same_kernel_size(window)
    inputs = (x1, strides_argument(x1), x2, strides_argument(x2), out)
    geometry = window_argument(window, height, width)
    if size:
        vector = vector_width(width, out)
        vectors = batch * channels * size * windows // vector
        launch(
            kernel(source, f"{name}_same", x1.dtype, reflects(window), size, vector),
            x1.device,
            -(-vectors // THREADS),
            THREADS,
            (
                *inputs,
                geometry,
                np.uint32(vectors),
                divisor_argument(width // vector),
                divisor_argument(height),
                divisor_argument(channels),
            ),
        )
        return
    threads = threads_for(windows, THREADS)
    chunks = -(-windows // threads)
    launch(
        kernel(source, name, x1.dtype, reflects(window)),
        x1.device,
        batch * channels * chunks,
        threads,
        (*inputs, geometry, channels, chunks),
    )


def backward_same(source: str, name: str, window: Window, grad: Tensor, *planes: Tensor) -> bool:
    """Write gradients, (N, C, H, W) in any layout, by a kernel for windows of stride 1.

    Returns:
        Whether the kernel takes these tensors; nothing is launched if it does not.
    """
    size = same_kernel_size(window)
    if not size or not grad.is_contiguous():
        return False
    batch, channels, height, width = planes[0].shape
    # Where the taps follow the centres, they begin after whole planes, which the vector divides.
    vector = vector_width(width, *planes, grad)
    vectors = width // vector
    if vectors > SAME_THREADS:
        return False
    rows = rows_of_tile(height, vectors, SAME_THREADS)
    tiles = -(-height // rows)
    outputs = [argument for plane in planes for argument in (plane, strides_argument(plane))]
    launch(
        kernel(source, name, grad.dtype, reflects(window), size, vector),
        grad.device,
        batch * channels * tiles,
        threads_for(rows * vectors, SAME_THREADS),
        (grad, *outputs, window_argument(window, height, width), channels, tiles, rows),
        rows * joined_pitch(width, size, vector) * accumulation_dtype(grad.dtype).itemsize,
    )
    return True


def backward_any(
    source: str, name: str, window: Window, grad: Tensor, grad1: Tensor, grad2: Tensor
) -> None:
    """Write the gradients of x1 and x2, (N, C, H, W) in any layout, for any windows."""
    batch, channels, height, width = grad1.shape
    threads = threads_for(height * width, THREADS)
    chunks = -(-height * width // threads)
    launch(
        kernel(source, name, grad.dtype, reflects(window)),
        grad.device,
        batch * channels * chunks,
        threads,
        (
            grad,
            strides_argument(grad),
            grad1,
            strides_argument(grad1),
            grad2,
            strides_argument(grad2),
            window_argument(window, height, width),
            channels,
            chunks,
        ),
    )
