"""Batch normalisation, 2 x 2 max-pooling and ReLU in one operator."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sanctl_ops import norm_formulas as formulas
from sanctl_ops.attention import Norm
from sanctl_ops.attention_checks import check_norm
from sanctl_ops.backend import choose_backend, runs_kernels
from sanctl_ops.checks import check_image, check_poolable
from sanctl_ops.kernels import channels as by_channels
from sanctl_ops.kernels import norm_pool as kernels
from sanctl_ops.kernels import pooling
from sanctl_ops.window import accumulation_dtype


def norm_pool(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel, keep the largest of every 2 x 2 pixels, and cut off below zero.

    `out = relu(max_pool2d(batch_norm(x), 2))`; pooling before the ReLU gives the same values and
    gradients as after it. The normalised tensor exists in neither direction. As in torch, a NaN
    stays one, the first of equal values takes the gradient, and the last row or column of an odd
    side counts in the statistics alone. Two runs give the same bits.

    Args:
        x: (N, C, H, W), H and W at least 2, not empty; float16, bfloat16, float32 or float64, in
            any memory layout. The kernels read channels_last.
        norm: the normalisation of C channels, by the statistics of x unless it has others.

    Returns:
        The output, (N, C, H // 2, W // 2), channels_last, of x's dtype; the mean and the biased
        variance of every channel, (C,), in float64 if x is, else in float32. Gradients flow from
        the output to x (channels_last), norm.weight and norm.bias; mean and variance have none.

    Raises:
        ValueError: x is not 4-d, empty, too small, or of another type; a tensor of norm is not
            (C,), of another type or on another device than x, or norm has only one statistic.
        BackendError: the CuPy kernels are asked for by name and cannot run on x's device.
    """
    check_image("x", x)
    check_poolable("x", x)
    check_norm("norm", norm, x.shape[1], x, "x")
    out, mean, variance, _ = _norm_pool(x, *norm)
    return out, mean, variance


def norm_pool_obstacle(x: Tensor) -> str | None:
    """Return why no kernels run `norm_pool` on (N, C, H, W), or None where they do.

    Raises:
        BackendError: the CuPy kernels are asked for by name and cannot run on x's device.
    """
    return _obstacle(x.device, x.dtype, x.shape[1])


# torch.compile asks once for channels, and need not look into it; it may see any number of images.
@torch.compiler.assume_constant_result
def _obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    choice = choose_backend(device)
    if choice.name == "torch":
        return choice.reason
    return by_channels.obstacle(dtype, channels, "norm_pool")


def _by_kernels(x: Tensor) -> bool:
    served = by_channels.obstacle(x.dtype, x.shape[1], "norm_pool") is None
    return runs_kernels(x.device) and served and by_channels.fits(x)


@torch.library.custom_op(
    "sanctl::norm_pool", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
)
def _norm_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, mean and variance, and (2, C) factors and summands of x."""
    norm = Norm(weight, bias, mean, variance, eps).to(accumulation_dtype(x.dtype))
    if _by_kernels(x):
        return kernels.forward(x, norm)
    mean, variance, table = formulas.statistics(x, norm)
    out = pooling.pooled_like(x, x.shape[1])
    out.copy_(F.max_pool2d(formulas.normalised(x, table), 2).relu_())
    return out, mean, variance, table


@_norm_pool.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    mean, variance = (weight.new_empty(weight.shape, dtype=dtype) for _ in range(2))
    table = weight.new_empty((2, *weight.shape), dtype=dtype)
    return pooling.pooled_like(x, x.shape[1]), mean, variance, table


@torch.library.custom_op(
    "sanctl::norm_pool_backward", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
)
def _norm_pool_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    table: Tensor,
    by_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = Norm(weight, bias, mean, variance, eps).to(table.dtype)
    if _by_kernels(x):
        grad_x, *gradients = kernels.backward(grad, x, norm, table.contiguous(), by_batch)
    else:
        normalised = formulas.normalised(x, table)
        most, places = F.max_pool2d(normalised, 2, return_indices=True)
        slope = torch.ops.aten.threshold_backward(grad.to(table.dtype), most, 0)
        slopes = torch.zeros_like(normalised, memory_format=torch.contiguous_format).flatten(2)
        # Windows do not overlap: no two gradients go to one place.
        slopes.scatter_(2, places.flatten(2), slope.flatten(2))
        slopes = slopes.view_as(normalised)
        grad_x, *gradients = formulas.gradients(slopes, x, norm, by_batch)
    return grad_x, gradients[0].to(weight.dtype), gradients[1].to(bias.dtype)


@_norm_pool_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    return grad_x, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, given, _, eps = inputs
    _, mean, variance, table = output
    ctx.mark_non_differentiable(mean, variance, table)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, variance, table)
    ctx.constants = (eps, given is None)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    (eps, by_batch), (*saved, table) = ctx.constants, ctx.saved_tensors
    return *_norm_pool_backward(grad, *saved, eps, table, by_batch), None, None, None


_norm_pool.register_autograd(_differentiate, setup_context=_save)
