"""What stands between the stages of SAN, pooled in one operator where that is the faster way."""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_models.autocast import convolved_dtype
from sanctl_models.normalise import is_affine, norm_argument, update_running_statistics
from sanctl_ops import (
    conv_norm_pool,
    conv_norm_pool_obstacle,
    norm_pool,
    norm_pool_obstacle,
)
from sanctl_ops.window import plane_format


def normalise_pool(batch_norm: nn.Module, x: Tensor) -> Tensor:
    """Return relu(max_pool2d(batch_norm(x), 2)), x being (N, C, H, W).

    Pooling before the ReLU gives the same values and gradients as after it, and rectifies a quarter
    of the pixels. On CUDA and in channels_last, a plain nn.BatchNorm2d without hooks is part of
    `sanctl_ops.norm_pool` where that has kernels: it spares writing and reading what is normalised,
    and updates buffers as the module does. Any other module is called.

    Args:
        batch_norm: the normalisation of C channels.
        x: the input; it is left as it is.
    """
    if _is_plain(batch_norm) and _is_served(x) and norm_pool_obstacle(x) is None:
        return normalise_pool_by_operator(batch_norm, x)
    return F.relu(F.max_pool2d(batch_norm(x), 2), inplace=True)


def normalise_pool_by_operator(batch_norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return relu(max_pool2d(batch_norm(x), 2)) by one operator, in channels_last.

    Args:
        batch_norm: with weight and bias.
        x: (N, C, H, W), H and W at least 2, not empty.
    """
    out, mean, variance = norm_pool(x, norm_argument(batch_norm))
    update_running_statistics(batch_norm, mean, variance, x.numel() // x.shape[1])
    return out


def convolve_normalise_pool(conv: nn.Module, batch_norm: nn.Module, images: Tensor) -> Tensor:
    """Return relu(max_pool2d(batch_norm(conv(images)), 2)), images being (N, Cin, H, W).

    As `normalise_pool` does; images that need no gradient, and a plain nn.Conv2d without hooks or
    bias that mixes the channels of single pixels, are part of `sanctl_ops.conv_norm_pool`.

    Args:
        conv: the convolution.
        batch_norm: the normalisation of its output.
        images: the input; it is left as it is.
    """
    if _mixes_channels(conv) and _is_plain(batch_norm) and _is_served(images):
        converted = images.to(convolved_dtype(images))
        if conv_norm_pool_obstacle(converted, conv.out_channels) is None:
            return convolve_normalise_pool_by_operator(conv, batch_norm, converted)
    return normalise_pool(batch_norm, conv(images))


def convolve_normalise_pool_by_operator(
    conv: nn.Conv2d, batch_norm: nn.BatchNorm2d, images: Tensor
) -> Tensor:
    """Return relu(max_pool2d(batch_norm(conv(images)), 2)) by one operator, in channels_last.

    Args:
        conv: 1 x 1, of stride 1, without padding, groups or bias.
        batch_norm: with weight and bias.
        images: (N, Cin, H, W), H and W at least 2, not empty, needing no gradient; the output is of
            their dtype.
    """
    norm = norm_argument(batch_norm)
    out, mean, variance = conv_norm_pool(images, conv.weight.flatten(1), norm)
    update_running_statistics(batch_norm, mean, variance, images.numel() // images.shape[1])
    return out


def _is_plain(batch_norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    if type(batch_norm) is not nn.BatchNorm2d or _has_hooks(batch_norm):
        return False
    return is_affine(batch_norm)


def _mixes_channels(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    if type(conv) is not nn.Conv2d or _has_hooks(conv):
        return False
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return geometry == ((1, 1), (1, 1), (0, 0), 1) and conv.bias is None


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or any((module._backward_hooks, module._backward_pre_hooks))


def _is_served(x: Tensor) -> bool:
    # torch itself knows what to do with, or say to, images of no or too few pixels.
    pools = x.numel() > 0 and min(x.shape[2:]) >= 2
    return x.is_cuda and pools and plane_format(x) == torch.channels_last
