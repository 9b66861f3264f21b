"""Launches of concatenation.cu."""

from torch import Tensor

from sanctl_ops.kernels import relation
from sanctl_ops.window import Window

SOURCE = "concatenation.cu"
BACKWARD = "concatenation_backward"


def forward(window: Window, x1: Tensor, x2: Tensor, out: Tensor) -> None:
    """Write the centres and the taps, contiguous (N, C * (K*K + 1), 1, P)."""
    relation.forward(SOURCE, "concatenation", window, x1, x2, out)


def backward(window: Window, grad: Tensor, grad1: Tensor, grad2: Tensor) -> None:
    """Write the gradients of x1 and x2, (N, C, H, W) in any layout, from that of the output."""
    if relation.backward_same(SOURCE, f"{BACKWARD}_same", window, grad, grad2):
        # There is a window for every pixel, so the centres are the pixels.
        grad1.copy_(grad[:, : grad1.shape[1], 0].unflatten(2, grad1.shape[2:]))
    else:
        relation.backward_any(SOURCE, BACKWARD, window, grad, grad1, grad2)
