"""Launches of subtraction2.cu."""

from torch import Tensor

from sanctl_ops.kernels import relation
from sanctl_ops.kernels.geometry import (
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

SOURCE = "subtraction2.cu"
THREADS = 128


def forward(window: Window, x1: Tensor, x2: Tensor) -> Tensor:
    """Return the (N, C, K*K, P) differences, contiguous."""
    rows, columns = window.output_size(*x1.shape[2:])
    out = x1.new_empty(*x1.shape[:2], window.taps, rows * columns)
    relation.forward(SOURCE, "subtraction2", window, x1, x2, out)
    return out


def backward(window: Window, grad: Tensor, grad1: Tensor, grad2: Tensor) -> None:
    """Write the gradients of x1 and x2, (N, C, H, W) in any layout, from that of the output."""
    if not _backward_same(window, grad, grad1, grad2):
        relation.backward_any(SOURCE, "subtraction2_backward", window, grad, grad1, grad2)


def _backward_same(window: Window, grad: Tensor, grad1: Tensor, grad2: Tensor) -> bool:
    """Return whether the fast kernel takes these tensors, having launched it."""
    size = same_kernel_size(window)
    if not size or not grad.is_contiguous():
        return False
    batch, channels, height, width = grad1.shape
    vector = vector_width(width, grad1, grad2, grad)
    vectors = width // vector
    if vectors > THREADS:
        return False
    rows = rows_of_tile(height, vectors, THREADS)
    tiles = -(-height // rows)
    launch(
        kernel(SOURCE, "subtraction2_backward_same", grad.dtype, reflects(window), size, vector),
        grad.device,
        batch * channels * tiles,
        threads_for(rows * vectors, THREADS),
        (
            grad,
            grad1,
            strides_argument(grad1),
            grad2,
            strides_argument(grad2),
            window_argument(window, height, width),
            channels,
            tiles,
            rows,
        ),
        rows * joined_pitch(width, size, vector) * accumulation_dtype(grad.dtype).itemsize,
    )
    return True
