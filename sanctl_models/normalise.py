"""Batch normalisation and ReLU in one operator, where that is the faster way."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_ops import batch_norm_relu


def normalise_relu(batch_norm: nn.Module, x: Tensor) -> Tensor:
    """Return relu(batch_norm(x)), x being (N, C, H, W).

    On CUDA and with the statistics of the batch, a plain nn.BatchNorm2d is applied by
    `sanctl_ops.batch_norm_relu` to contiguous planes: it takes one pass less than the two modules,
    and keeps the GPU busy where channels are few. Buffers are updated as the module does it itself;
    its hooks are not called. Any other module, such as nn.SyncBatchNorm, is called, and planes in
    another layout are left to it.

    Args:
        batch_norm: the normalisation of C channels.
        x: the input; it is left as it is.
    """
    if type(batch_norm) is nn.BatchNorm2d and x.is_cuda and _is_for_the_operator(batch_norm, x):
        return normalise_relu_by_operator(batch_norm, x)
    return F.relu(batch_norm(x), inplace=True)


def normalise_relu_by_operator(batch_norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return relu(batch_norm(x)) by the statistics of x, which update the running ones.

    Args:
        batch_norm: with weight and bias, and in training or without running statistics.
        x: (N, C, H, W), with at least 2 values per channel.
    """
    out, mean, variance = batch_norm_relu(x, batch_norm.weight, batch_norm.bias, batch_norm.eps)
    if batch_norm.training and batch_norm.track_running_stats:
        count = x.numel() // x.shape[1]
        _update_running_statistics(batch_norm, mean, variance * (count / (count - 1)))
    return out


def _is_for_the_operator(batch_norm: nn.BatchNorm2d, x: Tensor) -> bool:
    by_batch = batch_norm.training or batch_norm.running_mean is None
    affine = batch_norm.weight is not None and batch_norm.bias is not None
    # The module itself knows what to do with, or say to, channels of one value or none.
    return by_batch and affine and x.is_contiguous() and x.numel() > x.shape[1]


@torch.no_grad()
def _update_running_statistics(batch_norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Take over a share of the batch's mean and unbiased variance, as nn.BatchNorm2d does."""
    running_mean, running_var = batch_norm.running_mean, batch_norm.running_var
    seen, momentum = batch_norm.num_batches_tracked, batch_norm.momentum
    if running_mean is None or running_var is None or seen is None:
        return
    seen.add_(1)
    # Without a momentum, the average is a cumulative one.
    share = seen.to(running_mean.dtype).reciprocal() if momentum is None else momentum
    running_mean.lerp_(mean.to(running_mean.dtype), share)
    running_var.lerp_(variance.to(running_var.dtype), share)
