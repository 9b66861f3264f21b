"""Batch normalisation by the batch's own statistics, followed by ReLU, of channels_last tensors."""

from typing import Any

import torch
from torch import Tensor

from sanctl_ops import norm_formulas as formulas
from sanctl_ops.attention import Norm
from sanctl_ops.backend import runs_kernels
from sanctl_ops.kernels import channels as by_channels
from sanctl_ops.kernels import norm_relu as kernels
from sanctl_ops.window import accumulation_dtype


@torch.library.custom_op(
    "sanctl::batch_norm_relu_channels_last",
    mutates_args=(),
    tags=(torch.Tag.needs_fixed_stride_order,),
)
def batch_norm_relu_channels_last(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, mean and variance, and (2, C) factors and summands of x."""
    norm = Norm(weight, bias, None, None, eps).to(accumulation_dtype(x.dtype))
    if _by_kernels(x):
        return kernels.forward(x, norm)
    mean, variance, table = formulas.statistics(x, norm)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out.copy_(formulas.normalised(x, table).relu_()), mean, variance, table


@batch_norm_relu_channels_last.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    mean, variance = (weight.new_empty(weight.shape, dtype=dtype) for _ in range(2))
    table = weight.new_empty((2, *weight.shape), dtype=dtype)
    return torch.empty_like(x, memory_format=torch.channels_last), mean, variance, table


@torch.library.custom_op(
    "sanctl::batch_norm_relu_channels_last_backward",
    mutates_args=(),
    tags=(torch.Tag.needs_fixed_stride_order,),
)
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    table: Tensor,
    eps: float,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, to which `skip` is added, weight and bias."""
    norm = Norm(weight, bias, mean, variance, eps).to(table.dtype)
    if _by_kernels(x):
        grad_x, *gradients = kernels.backward(grad, x, norm, table.contiguous(), skip)
    else:
        before = formulas.normalised(x, table)
        slopes = torch.ops.aten.threshold_backward(grad.to(table.dtype), before, 0)
        grad_x, *gradients = formulas.gradients(slopes, x, norm, by_batch=True)
        if skip is not None:
            grad_x += skip
    return grad_x, gradients[0].to(weight.dtype), gradients[1].to(bias.dtype)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    return grad_x, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _by_kernels(x: Tensor) -> bool:
    served = by_channels.obstacle(x.dtype, x.shape[1], "batch_norm_relu") is None
    return served and runs_kernels(x.device) and by_channels.fits(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.eps, None), None


batch_norm_relu_channels_last.register_autograd(_differentiate, setup_context=_save)


class NormaliseWithSkip(torch.autograd.Function):
    """Returns the output, x, mean and variance; both gradients of x are computed in one pass.

    An operator may not return what it was given, a Function may.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the operator does, and x."""
        out, mean, variance, table = batch_norm_relu_channels_last(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, variance, table)
        ctx.mark_non_differentiable(mean, variance)
        ctx.eps = eps
        return out, x.view_as(x), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, skip: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; `skip` is that of x as it was returned."""
        return *_backward(grad, *ctx.saved_tensors, ctx.eps, skip), None
