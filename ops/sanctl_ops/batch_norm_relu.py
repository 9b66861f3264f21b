"""Batch normalisation by the batch's own statistics, followed by ReLU."""

from typing import Any, cast

import torch
from torch import Tensor

from sanctl_ops.attention import dense
from sanctl_ops.backend import choose_backend, runs_kernels
from sanctl_ops.batch_norm_relu_channels_last import (
    NormaliseWithSkip,
    batch_norm_relu_channels_last,
)
from sanctl_ops.checks import check_channel_values, check_image
from sanctl_ops.kernels import batch_norm_relu as kernels
from sanctl_ops.kernels import channels as by_channels
from sanctl_ops.window import accumulation_dtype, plane_format


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel by its mean and variance in x, scale, shift, and cut off below zero.

    `out = max(0, (x - mean) / sqrt(var + eps) * weight + bias)`, as batch normalisation does while
    training (Ioffe and Szegedy, ICML 2015, algorithm 1) with a ReLU behind it. A NaN stays one. The
    CUDA kernels for contiguous tensors are made for few channels with large planes, which torch's
    own spread over few multiprocessors; those for channels_last read and write at the speed of the
    memory. Two runs give the same bits.

    Args:
        x: (N, C, H, W), not empty; float16, bfloat16, float32 or float64, in any memory layout.
        weight: (C,), of any of these dtypes: float32 beside a 16-bit x is usual.
        bias: (C,), like weight.
        eps: what is added to the variance.

    Returns:
        The output, (N, C, H, W), channels_last if x is, else contiguous, of x's dtype; the mean and
        the biased variance of every channel, (C,), in float64 if x is, else in float32. Gradients
        flow from the output to x (likewise), weight and bias; mean and variance have none.

    Raises:
        ValueError: x is not 4-d, empty, or of another type; weight or bias is not (C,), of another
            type or on another device than x.
        BackendError: the CuPy kernels are asked for by name and cannot run on x's device.
    """
    _check(x, weight, bias)
    is_last = plane_format(x) == torch.channels_last
    operator = batch_norm_relu_channels_last if is_last else _batch_norm_relu
    out, mean, variance, _ = operator(x, weight, bias, eps)
    return out, mean, variance


def batch_norm_relu_with_skip(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise as `batch_norm_relu` does, and return x for a connection that skips what follows.

    Of channels_last tensors, the gradient that comes back through that connection is added in the
    pass that computes the one behind the normalisation, which spares autograd a pass.

    Args:
        x: (N, C, H, W), as `batch_norm_relu` takes it.
        weight: (C,).
        bias: (C,).
        eps: what is added to the variance.

    Returns:
        The output; x or a view of it; mean and variance, as `batch_norm_relu` returns them.

    Raises:
        ValueError, BackendError: as `batch_norm_relu`.
    """
    _check(x, weight, bias)
    if plane_format(x) == torch.channels_last:
        return cast("Any", NormaliseWithSkip.apply(x, weight, bias, eps))
    out, mean, variance, _ = _batch_norm_relu(x, weight, bias, eps)
    return out, x, mean, variance


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError unless they can be normalised."""
    check_image("x", x)
    if x.numel() == 0:
        raise ValueError(f"x {tuple(x.shape)} has no values to normalise")
    check_channel_values("weight", weight, x)
    check_channel_values("bias", bias, x)


def batch_norm_relu_obstacle(x: Tensor) -> str | None:
    """Return why no kernels run `batch_norm_relu` on (N, C, H, W), or None where they do.

    Raises:
        BackendError: the CuPy kernels are asked for by name and cannot run on x's device.
    """
    return _obstacle(x.device, x.dtype, x.shape[1], plane_format(x) == torch.channels_last)


# torch.compile asks once for channels, and need not look into it; it may see any number of images.
@torch.compiler.assume_constant_result
def _obstacle(device: torch.device, dtype: torch.dtype, channels: int, is_last: bool) -> str | None:
    choice = choose_backend(device)
    if choice.name == "torch":
        return choice.reason
    return by_channels.obstacle(dtype, channels, "batch_norm_relu") if is_last else None


@torch.library.custom_op("sanctl::batch_norm_relu", mutates_args=())
def _batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and each channel's mean, biased variance and inverse deviation."""
    x = x.contiguous()
    weight, bias = _converted(x, weight, bias)
    if runs_kernels(x.device) and kernels.fits(x):
        return kernels.forward(x, weight, bias, eps)
    # Unlike batch_norm's, these sums stay accurate where the mean is far from zero.
    variance, mean = torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0)
    out, *_ = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)
    return out.relu_(), mean, variance, (variance + eps).rsqrt()


@_batch_norm_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, variance, deviation = (
        weight.new_empty(weight.shape, dtype=accumulation_dtype(x.dtype)) for _ in range(3)
    )
    return x.new_empty(x.shape), mean, variance, deviation


@torch.library.custom_op("sanctl::batch_norm_relu_backward", mutates_args=())
def _batch_norm_relu_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    deviation: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    wide = _converted(x, weight, bias)
    if runs_kernels(x.device) and kernels.fits(x, grad):
        # Whether an output was positive is computed again: that is cheaper than reading it.
        grad_x, *gradients = kernels.backward(grad, x, *wide, mean, deviation)
    else:
        slope = torch.ops.aten.threshold_backward(grad, out, 0)
        grad_x, *gradients = torch.ops.aten.native_batch_norm_backward(
            slope, x, wide[0], None, None, mean, deviation, True, 0.0, [True] * 3
        )
    return grad_x, gradients[0].to(weight.dtype), gradients[1].to(bias.dtype)


@_batch_norm_relu_backward.register_fake
def _(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor, *statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _converted(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias as the sums over x are kept."""
    dtype = accumulation_dtype(x.dtype)
    return dense(weight, dtype), dense(bias, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    out, mean, variance, deviation = output
    ctx.mark_non_differentiable(mean, variance, deviation)
    ctx.save_for_backward(x, out, weight, bias, mean, deviation)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_batch_norm_relu_backward(grad, *ctx.saved_tensors), None


_batch_norm_relu.register_autograd(_differentiate, setup_context=_save)
