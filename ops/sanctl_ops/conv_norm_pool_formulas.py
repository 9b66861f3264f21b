"""1x1 convolution, batch normalisation, pooling and ReLU in torch, as conv_norm_pool.cu has them.

What is added up over the pixels is of the images alone; per channel of the output it is closed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels.pooling import pooled_like
from sanctl_ops.window import accumulation_dtype


def forward(
    images: Tensor, weight: Tensor, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `kernels.conv_norm_pool.forward` does, for any float types and channels."""
    dtype, rounded = accumulation_dtype(images.dtype), _rounded(weight, images)
    moments = images.new_zeros((images.shape[1] + 1, images.shape[1]), dtype=torch.float64)
    if norm.mean is None or norm.variance is None:
        moments = _moments(images)
        mean = rounded @ moments[0]
        # Rounding may leave less than 0.
        variance = (rounded @ moments[1:] * rounded).sum(1).clamp(min=0)
    else:
        mean, variance = norm.mean.double(), norm.variance.double()
    scale = norm.weight / (variance + norm.eps).sqrt()
    shift = norm.bias - scale * (mean - rounded @ moments[0])
    table = torch.cat(((rounded * scale[:, None]).mT, shift[None])).to(dtype)
    out = pooled_like(images, weight.shape[0])
    out.copy_(F.max_pool2d(_normalised(_relative(images, moments, dtype), table), 2).relu_())
    # An operator may not return what it was given.
    mean, variance = (t.to(dtype, copy=True) for t in (mean, variance))
    return out, mean, variance, moments, table


def backward(
    grad: Tensor, images: Tensor, weight: Tensor, norm: Norm, moments: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight, norm.weight and norm.bias."""
    assert norm.mean is not None
    assert norm.variance is not None
    x, rounded = _relative(images, moments, table.dtype), _rounded(weight, images)
    most, places = F.max_pool2d(_normalised(x, table), 2, return_indices=True)
    slopes = torch.ops.aten.threshold_backward(grad.to(table.dtype), most, 0).flatten(2)
    sums = [(slopes * _taken(x[:, i], places)).sum((0, 2)) for i in range(images.shape[1])]
    total, products = slopes.sum((0, 2)), torch.stack(sums, 1).double()
    deviation = (norm.variance.double() + norm.eps).rsqrt()
    from_point = norm.mean - rounded @ moments[0]
    grad_norm = deviation * ((products * rounded).sum(1) - from_point * total)
    shared_by_all = (grad_norm * deviation)[:, None] * (rounded @ moments[1:])
    return (norm.weight * deviation)[:, None] * (products - shared_by_all), grad_norm, total


def _rounded(weight: Tensor, images: Tensor) -> Tensor:
    """Return a weight as the convolution takes it, in float64."""
    return weight.to(images.dtype).double()


def _moments(images: Tensor) -> Tensor:
    """Return the mean and the rows of the covariance of the images' channels, (Cin + 1, Cin)."""
    pixels = images.transpose(0, 1).flatten(1).double()
    mean = pixels.mean(1, keepdim=True)
    centred = pixels - mean
    return torch.cat((mean.mT, centred @ centred.mT / pixels.shape[1]))


def _relative(images: Tensor, moments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the images relative to the point that the moments name."""
    return images.to(dtype) - moments[0, :, None, None].to(dtype)


def _normalised(x: Tensor, table: Tensor) -> Tensor:
    # Unlike a convolution's, the sums of equal pixels are equal to the last bit.
    normalised = table[-1, :, None, None]
    for factor, channel in zip(table[:-1, :, None, None], x.split(1, 1), strict=True):
        normalised = normalised + factor * channel
    return normalised


def _taken(plane: Tensor, places: Tensor) -> Tensor:
    """Return what lies in (N, H, W) where (N, Cout, H // 2, W // 2) places say."""
    values = plane.flatten(1)[:, None].expand(-1, places.shape[1], -1)
    return values.gather(2, places.flatten(2))
