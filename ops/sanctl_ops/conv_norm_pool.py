"""1x1 convolution of images, batch normalisation, 2 x 2 max-pooling and ReLU in one operator."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sanctl_ops import conv_norm_pool_formulas as formulas
from sanctl_ops.attention import Norm, dense
from sanctl_ops.attention_checks import check_norm
from sanctl_ops.backend import choose_backend, runs_kernels
from sanctl_ops.checks import check_device, check_dtype, check_image, check_poolable
from sanctl_ops.kernels import channels as by_channels
from sanctl_ops.kernels import conv_norm_pool as kernels
from sanctl_ops.kernels import pooling
from sanctl_ops.window import accumulation_dtype


def conv_norm_pool(images: Tensor, weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve images of few channels, normalise, keep the largest of 2 x 2, cut off below zero.

    `out = relu(max_pool2d(batch_norm(conv2d(images, weight)), 2))`, the convolution being 1 x 1.
    Nothing of its size exists in either direction: statistics and gradients are closed by the mean
    and the covariance of the images' channels, and values are computed again. As in torch, a NaN
    stays one, the first of equal values takes the gradient, and the last row or column of an odd
    side counts in the statistics alone. Two runs give the same bits.

    Args:
        images: (N, Cin, H, W), H and W at least 2, not empty; float16, bfloat16, float32 or
            float64, in any memory layout. They have no gradient. The kernels read channels_last.
        weight: (Cout, Cin), rounded to the images' dtype as autocast does.
        norm: the normalisation of Cout channels, by the statistics of the convolution unless it has
            others.

    Returns:
        The output, (N, Cout, H // 2, W // 2), channels_last, of the images' dtype; the mean and the
        biased variance of every channel, (Cout,), in float64 if the images are, else in float32.
        Gradients flow from the output to weight, norm.weight and norm.bias; mean and variance have
        none.

    Raises:
        ValueError: images are not 4-d, empty, too small, of another type, or require a gradient;
            weight is not (Cout, Cin) or a tensor of norm not (Cout,), of another type or on another
            device; or norm has only one statistic.
        BackendError: the CuPy kernels are asked for by name and cannot run on the images' device.
    """
    check_image("images", images)
    check_poolable("images", images)
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError("images require a gradient, which conv_norm_pool does not compute")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != images.shape[1]:
        raise ValueError(
            f"weight must be (Cout, Cin) for images {tuple(images.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    check_dtype("weight", weight)
    check_device("images", images, "weight", weight)
    check_norm("norm", norm, weight.shape[0], images, "images")
    out, mean, variance, *_ = _conv_norm_pool(images, weight, *norm)
    return out, mean, variance


def conv_norm_pool_obstacle(images: Tensor, channels: int) -> str | None:
    """Return why no kernels run `conv_norm_pool`, or None where they do.

    Args:
        images: (N, Cin, H, W).
        channels: Cout.

    Raises:
        BackendError: the CuPy kernels are asked for by name and cannot run on the images' device.
    """
    if images.requires_grad:
        return "conv_norm_pool does not compute gradients of images"
    return _obstacle(images.device, images.dtype, images.shape[1], channels)


# torch.compile asks once for channels, and need not look into it; it may see any number of images.
@torch.compiler.assume_constant_result
def _obstacle(
    device: torch.device, dtype: torch.dtype, image_channels: int, channels: int
) -> str | None:
    choice = choose_backend(device)
    if choice.name == "torch":
        return choice.reason
    return kernels.obstacle(dtype, image_channels, channels)


def _by_kernels(images: Tensor, weight: Tensor) -> bool:
    served = kernels.obstacle(images.dtype, images.shape[1], weight.shape[0]) is None
    return runs_kernels(images.device) and served and by_channels.fits(images)


@torch.library.custom_op(
    "sanctl::conv_norm_pool", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
)
def _conv_norm_pool(
    images: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_mean: Tensor | None,
    norm_variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, mean and variance, and moments and table as the kernels have them."""
    dtype = accumulation_dtype(images.dtype)
    norm = Norm(norm_weight, norm_bias, norm_mean, norm_variance, eps).to(dtype)
    if _by_kernels(images, weight):
        return kernels.forward(images, dense(weight, dtype), norm)
    return formulas.forward(images, weight, norm)


@_conv_norm_pool.register_fake
def _(images: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(images.dtype)
    channels, image_channels = weight.shape
    mean, variance = (images.new_empty(channels, dtype=dtype) for _ in range(2))
    moments = images.new_empty((image_channels + 1, image_channels), dtype=torch.float64)
    table = images.new_empty((image_channels + 1, channels), dtype=dtype)
    return pooling.pooled_like(images, channels), mean, variance, moments, table


@torch.library.custom_op(
    "sanctl::conv_norm_pool_backward", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
)
def _conv_norm_pool_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    moments: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = Norm(norm_weight, norm_bias, mean, variance, eps).to(table.dtype)
    if _by_kernels(images, weight):
        wide = dense(weight, table.dtype)
        moments, table = moments.contiguous(), table.contiguous()
        gradients = kernels.backward(grad, images, wide, norm, moments, table)
    else:
        gradients = formulas.backward(grad, images, weight, norm, moments, table)
    grad_weight, grad_norm, grad_bias = (
        g.to(p.dtype) for g, p in zip(gradients, (weight, norm_weight, norm_bias), strict=True)
    )
    return grad_weight, grad_norm, grad_bias


@_conv_norm_pool_backward.register_fake
def _(
    grad: Tensor, images: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_norm, grad_bias = (
        p.new_empty(p.shape) for p in (weight, norm_weight, norm_bias)
    )
    return grad_weight, grad_norm, grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, _, _, eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *output[1:])
    ctx.eps = eps


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    *known, moments, table = ctx.saved_tensors
    gradients = _conv_norm_pool_backward(grad, *known, ctx.eps, moments, table)
    return None, *gradients, None, None, None


_conv_norm_pool.register_autograd(_differentiate, setup_context=_save)


def _flops(images: tuple[int, ...], weight: tuple[int, ...]) -> int:
    """Multiply-adds of the convolution, each counted as 2."""
    return 2 * images[0] * math.prod(images[2:]) * math.prod(weight)


@register_flop_formula(torch.ops.sanctl.conv_norm_pool)
def _(images: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(images, weight)


@register_flop_formula(torch.ops.sanctl.conv_norm_pool_backward)
def _(grad: Any, images: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """Once more for the gradient of the weight."""
    return _flops(images, weight)
