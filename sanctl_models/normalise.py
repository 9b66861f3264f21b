"""Batch normalisation and ReLU in one operator, where that is the faster way."""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_ops import (
    Norm,
    batch_norm_relu,
    batch_norm_relu_obstacle,
    batch_norm_relu_with_skip,
)
from sanctl_ops.window import plane_format


def normalise_relu(batch_norm: nn.Module, x: Tensor) -> Tensor:
    """Return relu(batch_norm(x)), x being (N, C, H, W).

    On CUDA and with the statistics of the batch, a plain nn.BatchNorm2d is applied by
    `sanctl_ops.batch_norm_relu` where that has kernels, to contiguous and channels_last planes: it
    takes one pass less than the two modules, and keeps the GPU busy where channels are few. Buffers
    are updated as the module does it itself; its hooks are not called. Any other module, such as
    nn.SyncBatchNorm, is called, and planes in another layout are left to it.

    Args:
        batch_norm: the normalisation of C channels.
        x: the input; it is left as it is.
    """
    if _is_for_the_operator(batch_norm, x):
        return normalise_relu_by_operator(batch_norm, x)
    return F.relu(batch_norm(x), inplace=True)


def normalise_relu_with_skip(batch_norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return relu(batch_norm(x)), as `normalise_relu`, and x for a connection that skips the rest.

    Where the operator serves channels_last planes, the gradients of both are added up in it.
    """
    if not _is_for_the_operator(batch_norm, x):
        return F.relu(batch_norm(x), inplace=True), x
    return normalise_relu_with_skip_by_operator(batch_norm, x)


def normalise_relu_with_skip_by_operator(
    batch_norm: nn.BatchNorm2d, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `normalise_relu_by_operator` does, and x; the same is asked of them."""
    out, skip, mean, variance = batch_norm_relu_with_skip(
        x, batch_norm.weight, batch_norm.bias, batch_norm.eps
    )
    update_running_statistics(batch_norm, mean, variance, x.numel() // x.shape[1])
    return out, skip


def normalise_relu_by_operator(batch_norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return relu(batch_norm(x)) by the statistics of x, which update the running ones.

    Args:
        batch_norm: with weight and bias, and in training or without running statistics.
        x: (N, C, H, W), with at least 2 values per channel.
    """
    out, mean, variance = batch_norm_relu(x, batch_norm.weight, batch_norm.bias, batch_norm.eps)
    update_running_statistics(batch_norm, mean, variance, x.numel() // x.shape[1])
    return out


def norm_argument(batch_norm: nn.BatchNorm2d) -> Norm:
    """Return how the fused operators take a normalisation that has weight and bias."""
    by_batch = normalises_by_batch(batch_norm)
    mean, variance = (None, None) if by_batch else (batch_norm.running_mean, batch_norm.running_var)
    return Norm(batch_norm.weight, batch_norm.bias, mean, variance, batch_norm.eps)


def normalises_by_batch(batch_norm: nn.BatchNorm2d) -> bool:
    """Tell whether the statistics are those of the batch, not the running ones."""
    return batch_norm.training or batch_norm.running_mean is None


def _is_for_the_operator(batch_norm: nn.Module, x: Tensor) -> TypeGuard[nn.BatchNorm2d]:
    if type(batch_norm) is not nn.BatchNorm2d or not x.is_cuda:
        return False
    # The module itself knows what to do with, or say to, channels of one value or none.
    plain = normalises_by_batch(batch_norm) and is_affine(batch_norm)
    # While it compiles, torch does not know planes of an open number of images to be channels_last.
    served = x.is_contiguous() or plane_format(x) == torch.channels_last
    return plain and served and x.numel() > x.shape[1] and batch_norm_relu_obstacle(x) is None


def is_affine(batch_norm: nn.BatchNorm2d) -> bool:
    """Tell whether it has weight and bias."""
    return batch_norm.weight is not None and batch_norm.bias is not None


@torch.no_grad()
def update_running_statistics(
    batch_norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int
) -> None:
    """Take over a share of a batch's statistics while training, as nn.BatchNorm2d does.

    Args:
        batch_norm: of C channels.
        mean: (C,).
        variance: (C,), biased.
        count: values per channel that they are of, at least 2.
    """
    running_mean, running_var = batch_norm.running_mean, batch_norm.running_var
    seen, momentum = batch_norm.num_batches_tracked, batch_norm.momentum
    if not batch_norm.training or running_mean is None or running_var is None or seen is None:
        return
    seen.add_(1)
    # Without a momentum, the average is a cumulative one.
    share = seen.to(running_mean.dtype).reciprocal() if momentum is None else momentum
    unbiased = variance * (count / (count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), share)
    running_var.lerp_(unbiased.to(running_var.dtype), share)
