"""Reflection padding whose backward pass is deterministic."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _ReflectPad(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, padding: int) -> Tensor:
        return F.pad(x, [padding] * 4, mode="reflect")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.padding = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        for dim in (2, 3):
            grad = _fold(grad, dim, ctx.padding)
        return grad, None


def _fold(padded: Tensor, dim: int, padding: int) -> Tensor:
    """Add the margins along `dim` to the pixels that they mirror; return these without margins."""
    side = padded.shape[dim] - 2 * padding
    inner = padded.narrow(dim, padding, side).clone()
    before = padded.narrow(dim, 0, padding).flip(dim)
    after = padded.narrow(dim, padding + side, padding).flip(dim)
    inner.narrow(dim, 1, padding).add_(before)
    inner.narrow(dim, side - 1 - padding, padding).add_(after)
    return inner


def reflect_pad(x: Tensor, padding: int) -> Tensor:
    """Mirror `padding` pixels at every border of x, without repeating the border pixel.

    Equal to `torch.nn.functional.pad(x, [padding] * 4, mode="reflect")`, whose own backward adds
    with atomics on CUDA: not deterministic, and refused by torch.use_deterministic_algorithms.

    Args:
        x: (N, C, H, W).
        padding: pixels on each side, less than H and W.

    Returns:
        (N, C, H + 2 * padding, W + 2 * padding).
    """
    if padding == 0:
        return x
    padded: Tensor = _ReflectPad.apply(x, padding)
    return padded
