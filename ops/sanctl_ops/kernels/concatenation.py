"""Launches of concatenation.cu."""

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

SOURCE = "concatenation.cu"
THREADS = 128


def forward(window: Window, x1: Tensor, x2: Tensor, out: Tensor) -> None:
    """Write the centres and the taps, contiguous (N, C * (K*K + 1), 1, P)."""
    relation.forward(SOURCE, "concatenation", window, x1, x2, out)


def backward(window: Window, grad: Tensor, grad1: Tensor, grad2: Tensor) -> None:
    """Write the gradients of x1 and x2, (N, C, H, W) in any layout, from that of the output."""
    if not _backward_same(window, grad, grad1, grad2):
        relation.backward_any(SOURCE, "concatenation_backward", window, grad, grad1, grad2)


def _backward_same(window: Window, grad: Tensor, grad1: Tensor, grad2: Tensor) -> bool:
    """Return whether the fast kernel takes these tensors, having launched it."""
    size = same_kernel_size(window)
    if not size or not grad.is_contiguous():
        return False
    batch, channels, height, width = grad2.shape
    # The taps' part begins after whole planes, whose size the vector divides as it does a row.
    vector = vector_width(width, grad2, grad)
    vectors = width // vector
    if vectors > THREADS:
        return False
    # There is a window for every pixel, so the centres are the pixels.
    grad1.copy_(grad[:, :channels, 0].unflatten(2, (height, width)))
    rows = rows_of_tile(height, vectors, THREADS)
    tiles = -(-height // rows)
    launch(
        kernel(SOURCE, "concatenation_backward_same", grad.dtype, reflects(window), size, vector),
        grad.device,
        batch * channels * tiles,
        threads_for(rows * vectors, THREADS),
        (
            grad,
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
