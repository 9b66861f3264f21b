"""Batch normalisation in torch, for operators that do more than normalise."""

import torch
from torch import Tensor

from sanctl_ops.attention import Norm


def statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of every channel, and (2, C) factors and summands of x.

    Args:
        x: (N, C, H, W).
        norm: the normalisation, in the dtype of what is returned; the statistics are those of x
            unless it has others.
    """
    if norm.mean is None or norm.variance is None:
        variance, mean = torch.var_mean(x.to(norm.weight.dtype), (0, 2, 3), correction=0)
    else:
        # An operator may not return what it was given.
        variance, mean = norm.variance.clone(), norm.mean.clone()
    scale = norm.weight / (variance + norm.eps).sqrt()
    return mean, variance, torch.stack((scale, norm.bias - scale * mean))


def normalised(x: Tensor, table: Tensor) -> Tensor:
    """Return x normalised, in the dtype of the table of factors and summands."""
    scale, shift = (t[:, None, None] for t in table)
    return x.to(table.dtype) * scale + shift


def gradients(
    slopes: Tensor, x: Tensor, norm: Norm, by_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, channels_last, and of weight and bias.

    Args:
        slopes: (N, C, H, W), the gradient of what is normalised, in the dtype of norm.
        x: what was normalised.
        norm: the normalisation, with what was normalised by.
        by_batch: whether that is of x itself.
    """
    assert norm.mean is not None
    assert norm.variance is not None
    wide, weight, bias = torch.ops.aten.native_batch_norm_backward(
        *(slopes, x.to(slopes.dtype), norm.weight, norm.mean, norm.variance, norm.mean),
        *((norm.variance + norm.eps).rsqrt(), by_batch, norm.eps, [True] * 3),
    )
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(wide), weight, bias
