"""Launches of subtraction2.cu."""

from torch import Tensor

from sanctl_ops.kernels import relation
from sanctl_ops.window import Window

SOURCE = "subtraction2.cu"
BACKWARD = "subtraction2_backward"


def forward(window: Window, x1: Tensor, x2: Tensor) -> Tensor:
    """Return the (N, C, K*K, P) differences, contiguous."""
    rows, columns = window.output_size(*x1.shape[2:])
    out = x1.new_empty(*x1.shape[:2], window.taps, rows * columns)
    relation.forward(SOURCE, "subtraction2", window, x1, x2, out)
    return out


def backward(window: Window, grad: Tensor, grad1: Tensor, grad2: Tensor) -> None:
    """Write the gradients of x1 and x2, (N, C, H, W) in any layout, from that of the output."""
    same = f"{BACKWARD}_same"
    if not relation.backward_same(SOURCE, same, window, grad, grad1, grad2):
        relation.backward_any(SOURCE, BACKWARD, window, grad, grad1, grad2)
