"""Launches of batch_norm_relu.cu; tensors are contiguous, (N, C, H, W) or one value per channel."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import VECTOR_BYTES, WARP
from sanctl_ops.kernels.runtime import kernel, launch

SOURCE = "batch_norm_relu.cu"
# As in batch_norm_relu.cu, with the doubles of its structs Moments and Sums.
THREADS = 256
IN_FLIGHT = 4
MOMENTS, SUMS = 3, 2
VECTOR = 4
# Several for each multiprocessor of the largest GPUs, however many channels there are.
BLOCKS = 2048
INDICES = 2**32


@dataclass(frozen=True)
class _Plan:
    """How the kernels deal out the work; from shapes and alignment only, so that sums repeat.

    Attributes:
        width: elements of a vector.
        vectors: vectors of a plane.
        all_vectors: vectors of the whole tensor.
        parts: blocks that share a channel.
    """

    width: int
    vectors: int
    all_vectors: int
    parts: int

    @property
    def blocks(self) -> int:
        """Blocks of the kernels that go through the whole tensor."""
        return -(-self.all_vectors // (THREADS * IN_FLIGHT))


def fits(*tensors: Tensor) -> bool:
    """Tell whether the kernels, which count vectors in 32 bits, take these large tensors."""
    plan = _plan(*tensors)
    return plan.all_vectors + THREADS * max(IN_FLIGHT, plan.parts) < INDICES


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and each channel's mean, biased variance and inverse deviation.

    `weight` and `bias` are in the accumulation dtype, as all values per channel are.
    """
    images, channels = x.shape[:2]
    out = x.new_empty(x.shape)
    mean, variance, deviation = (torch.empty_like(weight) for _ in range(3))
    plan = _plan(x, out)
    vectors = np.uint32(plan.vectors)
    partials = _partials(x, channels * plan.parts, MOMENTS)
    launch(
        kernel(SOURCE, "moments", x.dtype, plan.width),
        x.device,
        channels * plan.parts,
        THREADS,
        (x, partials, images, channels, vectors, plan.parts),
    )
    launch(
        kernel(SOURCE, "join_moments", weight.dtype),
        x.device,
        channels,
        WARP,
        (partials, mean, variance, deviation, float(eps), plan.parts),
    )
    launch(
        kernel(SOURCE, "normalise", x.dtype, plan.width),
        x.device,
        plan.blocks,
        THREADS,
        (x, out, mean, deviation, weight, bias, channels, vectors, np.uint32(plan.all_vectors)),
    )
    return out, mean, variance, deviation


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, the last two in the accumulation dtype."""
    images, channels = x.shape[:2]
    grad_x = x.new_empty(x.shape)
    grad_weight, grad_bias = (torch.empty_like(weight) for _ in range(2))
    plan = _plan(x, grad, grad_x)
    vectors = np.uint32(plan.vectors)
    partials = _partials(x, channels * plan.parts, SUMS)
    per_channel = (mean, deviation, weight, bias)
    launch(
        kernel(SOURCE, "slope_sums", x.dtype, plan.width),
        x.device,
        channels * plan.parts,
        THREADS,
        (grad, x, *per_channel, partials, images, channels, vectors, plan.parts),
    )
    launch(
        kernel(SOURCE, "join_sums", weight.dtype),
        x.device,
        channels,
        WARP,
        (partials, grad_weight, grad_bias, plan.parts),
    )
    count = float(x.numel() // channels)
    totals = (grad_weight, grad_bias, count, channels, vectors, np.uint32(plan.all_vectors))
    launch(
        kernel(SOURCE, "input_gradient", x.dtype, plan.width),
        x.device,
        plan.blocks,
        THREADS,
        (grad, x, grad_x, *per_channel, *totals),
    )
    return grad_x, grad_weight, grad_bias


def _plan(*tensors: Tensor) -> _Plan:
    x = tensors[0]
    images, channels, height, width = x.shape
    step = VECTOR * x.itemsize
    aligned = all(tensor.data_ptr() % step == 0 for tensor in tensors)
    vector = VECTOR if step <= VECTOR_BYTES and height * width % VECTOR == 0 and aligned else 1
    vectors = height * width // vector
    parts = min(-(-BLOCKS // channels), -(-images * vectors // (THREADS * IN_FLIGHT)))
    return _Plan(vector, vectors, images * channels * vectors, max(1, parts))


def _partials(x: Tensor, count: int, doubles: int) -> Tensor:
    return torch.empty(count * doubles, dtype=torch.float64, device=x.device)
