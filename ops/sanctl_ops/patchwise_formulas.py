"""Patchwise attention from the other operators and torch's, a few images at a time.

Relations, weights and their gradients exist for one chunk of images only, and what the backward
pass needs of them is computed again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.relation_statistics import relation_statistics
from sanctl_ops.window import accumulation_dtype, plane_format

# Elements of a relation that are held at once.
CHUNK = 2**24


@dataclass(frozen=True)
class Layer:
    """The two normalisations, in whose place statistics are known, and the two 1x1 convolutions."""

    norm1: Norm
    weight1: Tensor
    norm2: Norm
    weight2: Tensor
    bias2: Tensor
    kernel_size: int

    def to(self, dtype: torch.dtype) -> "Layer":
        """Return the same layer with all its tensors of `dtype`."""
        return Layer(
            self.norm1.to(dtype),
            self.weight1.to(dtype),
            self.norm2.to(dtype),
            self.weight2.to(dtype),
            self.bias2.to(dtype),
            self.kernel_size,
        )

    @property
    def geometry(self) -> tuple[int, int, int, int, str]:
        """The windows as the other operators take them."""
        return self.kernel_size, 1, self.kernel_size // 2, 1, "reflect"


def forward(
    query: Tensor, key: Tensor, value: Tensor, layer: Layer
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, both normalisations' means and variances, and the hidden values.

    The hidden values, (N, P, Cw), lie between the first convolution and its normalisation.
    """
    dtype = accumulation_dtype(query.dtype)
    layer = layer.to(dtype)
    known1 = _known(layer.norm1) or relation_statistics(query, key, layer.kernel_size)
    mean1, variance1 = (t.to(dtype, copy=True) for t in known1)
    norm1 = layer.norm1._replace(mean=mean1, variance=variance1)
    batch, _, height, width = query.shape
    hidden = query.new_empty((batch, height * width, layer.weight1.shape[0]), dtype=dtype)
    for part in _chunks(query, layer):
        relation = _relation(query[part], key[part], layer, dtype)
        hidden[part] = (layer.weight1 @ _Normalised(relation, norm1).relu()).mT
    known2 = _known(layer.norm2) or torch.var_mean(hidden.double(), (0, 1), correction=0)[::-1]
    mean2, variance2 = (t.to(dtype, copy=True) for t in known2)
    norm2 = layer.norm2._replace(mean=mean2, variance=variance2)
    out = torch.empty_like(value, memory_format=plane_format(value))
    for part in _chunks(query, layer):
        weights = _weights(_Normalised(hidden[part].mT, norm2).relu(), layer)
        out[part] = torch.ops.sanctl.aggregation(value[part].to(dtype), weights, *layer.geometry)
    return out, mean1, variance1, mean2, variance2, hidden


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    layer: Layer,
    by_batch: tuple[bool, bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, and of the layer's seven parameters.

    Args:
        grad: the output's.
        query: as `forward` took it.
        key: the same.
        value: the same.
        hidden: what `forward` returned.
        layer: with the means and variances that `forward` returned.
        by_batch: whether those of the two normalisations are the batch's own.
    """
    dtype = accumulation_dtype(query.dtype)
    wide = layer.to(dtype)
    hidden = hidden.mT
    grad_value, grad_hidden, second = _backward_to_hidden(grad, value, hidden, wide)
    normalised = _Normalised(hidden, wide.norm2)
    sums2 = normalised.sums(grad_hidden)
    count = hidden.shape[0] * hidden.shape[2]
    slope = normalised.backward(grad_hidden, sums2, count if by_batch[1] else None)
    grad_query, grad_key, grad_weight1, sums1 = _backward_to_images(
        slope, query, key, wide, count if by_batch[0] else None
    )
    norms = (layer.norm1.weight, layer.norm1.bias, layer.weight1, *layer.norm2[:2])
    narrow = (*norms, layer.weight2, layer.bias2)
    parameters = (*sums1, grad_weight1, *sums2, *second)
    return (
        *(grad_query, grad_key, grad_value),
        *(g.to(p.dtype) for g, p in zip(parameters, narrow, strict=True)),
    )


def _backward_to_hidden(
    grad: Tensor, value: Tensor, hidden: Tensor, layer: Layer
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the gradients of value, of the second normalisation's output, of weight2 and bias2."""
    dtype = hidden.dtype
    grad_value = torch.empty_like(value, memory_format=plane_format(value))
    grad_hidden = torch.empty_like(hidden)
    grad_weight, grad_bias = torch.zeros_like(layer.weight2), torch.zeros_like(layer.bias2)
    for part in _chunks(grad, layer, value.shape[1]):
        rectified = _Normalised(hidden[part], layer.norm2).relu()
        grad_value[part], slope = torch.ops.sanctl.aggregation_backward(
            grad[part].to(dtype),
            value[part].to(dtype),
            _weights(rectified, layer),
            *layer.geometry,
        )
        slope = slope.flatten(1, 2)
        grad_weight += torch.einsum("nop,nip->oi", slope, rectified)
        grad_bias += slope.sum((0, 2))
        grad_hidden[part] = (layer.weight2.mT @ slope) * (rectified > 0)
    return grad_value, grad_hidden, (grad_weight, grad_bias)


def _backward_to_images(
    slope: Tensor, query: Tensor, key: Tensor, layer: Layer, count: int | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the gradients of query, key, weight1 and the first normalisation's two parameters.

    Args:
        slope: (N, Cw, P), the gradient of the hidden values.
        query: (N, rel, H, W).
        key: like query.
        layer: in slope's dtype.
        count: values per channel of the relation, if they were normalised by their own statistics.
    """
    grad_weight, sums = torch.zeros_like(layer.weight1), None
    for part in _chunks(query, layer):
        normalised = _Normalised(_relation(query[part], key[part], layer, slope.dtype), layer.norm1)
        rectified = normalised.relu()
        grad_weight += torch.einsum("nop,nip->oi", slope[part], rectified)
        added = normalised.sums((layer.weight1.mT @ slope[part]) * (rectified > 0))
        sums = added if sums is None else (sums[0] + added[0], sums[1] + added[1])
    sums = sums or (torch.zeros_like(layer.norm1.weight), torch.zeros_like(layer.norm1.bias))
    grad_query = torch.empty_like(query, memory_format=plane_format(query))
    grad_key = torch.empty_like(key, memory_format=plane_format(key))
    for part in _chunks(query, layer):
        normalised = _Normalised(_relation(query[part], key[part], layer, slope.dtype), layer.norm1)
        gradient = (layer.weight1.mT @ slope[part]) * (normalised.relu() > 0)
        grad_query[part], grad_key[part] = torch.ops.sanctl.concatenation_backward(
            normalised.backward(gradient, sums, count).unsqueeze(2),
            *query.shape[2:],
            False,
            *layer.geometry,
        )
    return grad_query, grad_key, grad_weight, sums


class _Normalised:
    """Channels (N, C, P) normalised by given statistics."""

    def __init__(self, x: Tensor, norm: Norm) -> None:
        mean, variance = _known(norm) or (x, x)
        self._deviation = (variance + norm.eps).rsqrt()[:, None]
        self._norm = norm
        # Subtracted before anything is multiplied: means may be far from zero.
        self._centred = (x - mean[:, None]) * self._deviation

    def relu(self) -> Tensor:
        return self._centred.mul(self._norm.weight[:, None]).add_(self._norm.bias[:, None]).relu_()

    def sums(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight and bias."""
        return (grad * self._centred).sum((0, 2)), grad.sum((0, 2))

    def backward(self, grad: Tensor, sums: tuple[Tensor, Tensor], count: int | None) -> Tensor:
        """Return the gradient of x; `count` values of a channel made the statistics."""
        if count is not None:
            grad = grad - (sums[1][:, None] + self._centred * sums[0][:, None]) / count
        return grad * (self._norm.weight[:, None] * self._deviation)


def _known(norm: Norm) -> tuple[Tensor, Tensor] | None:
    if norm.mean is None or norm.variance is None:
        return None
    return norm.mean, norm.variance


def _relation(query: Tensor, key: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    joined: Tensor = torch.ops.sanctl.concatenation(query, key, *layer.geometry)
    return joined.squeeze(2).to(dtype)


def _weights(rectified: Tensor, layer: Layer) -> Tensor:
    """Return (N, Cw, K*K, P) for hidden values (N, Cw, P)."""
    weights = layer.weight2 @ rectified + layer.bias2[:, None]
    return weights.unflatten(1, (rectified.shape[1], -1))


def _chunks(images: Tensor, layer: Layer, channels: int = 0) -> Iterator[slice]:
    """Deal out the images so that no relation, nor weights, take more than CHUNK elements."""
    channels = max(layer.weight1.shape[1], layer.weight2.shape[0], channels)
    size = max(1, CHUNK // max(1, channels * images.shape[2] * images.shape[3]))
    return (slice(i, i + size) for i in range(0, images.shape[0], size))
