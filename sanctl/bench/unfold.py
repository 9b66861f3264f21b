"""The operators the plain torch way, windows by `F.unfold`: baseline of speed and reference.

All windows are K x K with odd K, stride 1 and (K - 1) / 2 reflected pixels on each side, so that
there are as many windows P as pixels. Everything here is differentiable by torch alone and shares
no code with `sanctl_ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def subtraction2(kernel_size: int, x1: Tensor, x2: Tensor) -> Tensor:
    """Return x1's pixels minus the taps of x2's windows, (N, C, K*K, P), for (N, C, H, W) each."""
    return x1.flatten(2).unsqueeze(2) - _taps(kernel_size, x2)


def subtraction(kernel_size: int, x: Tensor) -> Tensor:
    """Return the differences of x's pixels to the taps of their windows, (N, C, K*K, P)."""
    return subtraction2(kernel_size, x, x)


def concatenation(kernel_size: int, x1: Tensor, x2: Tensor) -> Tensor:
    """Return x1's pixels and, behind them, the taps of x2's windows, (N, C * (K*K + 1), 1, P)."""
    return torch.cat((x1.flatten(2), _taps(kernel_size, x2).flatten(1, 2)), 1).unsqueeze(2)


def aggregation(kernel_size: int, x: Tensor, w: Tensor) -> Tensor:
    """Return the windows of x (N, C, H, W) summed with weights w (N, Cw, K*K, P), shaped as x."""
    groups = _taps(kernel_size, x).unflatten(1, (-1, w.shape[1]))
    return (groups * w.unsqueeze(1)).sum(3).reshape(x.shape)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x (N, C, H, W) normalised as while training, by weight and bias (C,), cut off at 0."""
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))


def _taps(kernel_size: int, x: Tensor) -> Tensor:
    """Copy the windows of x (N, C, H, W) into (N, C, K*K, P)."""
    padded = F.pad(x, [kernel_size // 2] * 4, mode="reflect")
    return F.unfold(padded, kernel_size).unflatten(1, (x.shape[1], kernel_size**2))
