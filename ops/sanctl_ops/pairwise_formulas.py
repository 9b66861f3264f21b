"""Pairwise attention in plain torch: passes over a few images at a time, forward and backward.

With q and k the query and key joined with the positions, for tap j of the window at pixel i,

    d = q_i - k_nbr(i, j),  z = relu(norm1(d)),  y = W1 z,  h = relu(norm2(y)),  l = W2 h,
    P = softmax over j of l,  out_i = sum_j P v_nbr(i, j).

The first normalisation's statistics follow from planes alone, the second's from the Gram matrix of
z: var(y) = diag(W1 cov(z) W1^T). Backward, both normalisations' corrections are added in closed
form, so that nothing with K * K taps is kept beyond a few images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sanctl_ops.window import Window, accumulation_dtype

# Elements of a tensor with K * K taps that are held at once, at least those of one image.
AT_ONCE = 2**22


@dataclass(frozen=True)
class Normalised:
    """A normalisation with its statistics, all per channel and in float64.

    Attributes:
        weight: its parameter of that name.
        mean: what it subtracts.
        deviation: 1 / sqrt(variance + eps).
        shift: norm(x) = scale * x + shift.
        by_batch: whether the statistics depend on the input.
    """

    weight: Tensor
    mean: Tensor
    deviation: Tensor
    shift: Tensor
    by_batch: bool

    @property
    def scale(self) -> Tensor:
        """Return what the input is multiplied by."""
        return self.weight * self.deviation


def normalised(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float, by_batch: bool
) -> Normalised:
    """Return what a normalisation multiplies by and adds."""
    weight, mean = weight.double(), mean.double()
    deviation = (variance.double() + eps).rsqrt()
    shift = bias.double() - weight * deviation * mean
    return Normalised(weight, mean, deviation, shift, by_batch)


def join(planes: Tensor, position: Tensor) -> Tensor:
    """Return (N, rel + 2, H, W): the planes of query or key with the positions behind them."""
    return torch.cat((planes, position.expand(planes.shape[0], -1, -1, -1)), 1)


def statistics1(q: Tensor, k: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of every channel of d, in float64.

    Args:
        q: (N, C, H, W), the centres.
        k: (N, C, H, W), the neighbours.
        window: K x K windows of stride 1 with K // 2 reflected pixels.
    """
    boxes = _boxes(window, q)
    counts = boxes[0].sum(0)[:, None] * boxes[1].sum(0)
    terms = q[:, 0].numel() * window.taps
    q, k = q.double(), k.double()
    mean_q, mean_k = q.mean((0, 2, 3)), (k * counts).sum((0, 2, 3)) / terms
    q, k = q - _channels(mean_q), k - _channels(mean_k)
    squares = window.taps * q.square() + counts * k.square() - 2 * q * _sum_windows(k, boxes)
    return mean_q - mean_k, squares.sum((0, 2, 3)).div_(terms).clamp_min_(0)


def gram(q: Tensor, k: Tensor, norm1: Normalised, window: Window) -> Tensor:
    """Return sum [z; 1] [z; 1]^T over all images, pixels and taps: (C + 1, C + 1), float64."""
    size = q.shape[1] + 1
    total = torch.zeros(size, size, dtype=torch.float64, device=q.device)
    for part in _parts(q, window):
        z = F.pad(_relu_relation(q[part], k[part], norm1, window), (0, 1), value=1.0).flatten(0, -2)
        total += (z.T @ z).double()
    return total


def statistics2(gram: Tensor, weight1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of y = weight1 z, in float64."""
    w, mean_z = weight1.double(), gram[-1, :-1] / gram[-1, -1]
    covariance = gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean_z, mean_z)
    return w @ mean_z, ((w @ covariance) * w).sum(1).clamp_min_(0)


@dataclass(frozen=True)
class Layers:
    """What makes weights of the relation.

    Attributes:
        norm1: before the first convolution.
        weight1: (rel, rel + 2), of that convolution.
        norm2: before the second convolution.
        weight2: (Cw, rel), of that convolution. Its bias cancels in the softmax.
    """

    norm1: Normalised
    weight1: Tensor
    norm2: Normalised
    weight2: Tensor

    def hidden(self, z: Tensor) -> Tensor:
        """Return h for z, (..., rel + 2)."""
        weight = (self.norm2.scale[:, None] * self.weight1).to(z.dtype)
        return (z @ weight.T + self.norm2.shift.to(z.dtype)).relu_()

    def weights(self, h: Tensor) -> Tensor:
        """Return P for h, (n, K*K, H, W, rel)."""
        return (h @ self.weight2.to(h.dtype).T).softmax(1)


def forward(q: Tensor, k: Tensor, value: Tensor, layers: Layers, window: Window) -> Tensor:
    """Return out, (N, C, H, W), in the accumulation dtype."""
    outs = []
    for part in _parts(q, window):
        z = _relu_relation(q[part], k[part], layers.norm1, window)
        weights = layers.weights(layers.hidden(z))
        taps = _grouped(_taps(value[part], window), weights)
        outs.append((weights[..., None, :] * taps).sum(1).flatten(-2).movedim(-1, 1))
    return torch.cat(outs)


@dataclass(frozen=True)
class Gradients:
    """Gradients of planes in any dtype, of all else in the accumulation dtype or float64."""

    query: Tensor
    key: Tensor
    value: Tensor
    position: Tensor
    norm1: tuple[Tensor, Tensor]
    weight1: Tensor
    norm2: tuple[Tensor, Tensor]
    weight2: Tensor


@dataclass(frozen=True)
class Closing:
    """The second normalisation's gradients, and those of z as they follow from g2.

    Attributes:
        weight, bias: gradients of its scale and shift.
        weight1: gradient of the first convolution's weights.
        direct, indirect, constant: dz = g2 direct - z indirect - constant.
    """

    weight: Tensor
    bias: Tensor
    weight1: Tensor
    direct: Tensor
    indirect: Tensor
    constant: Tensor


def close2(sums: Tensor, gram: Tensor, layers: Layers, terms: int) -> Closing:
    """Close the backward pass of the second normalisation.

    Args:
        sums: (rel, rel + 3), the sum of g2 [z; 1]^T, g2 being the gradient behind norm2.
        gram: (rel + 3, rel + 3), as `gram` returns it; read only if norm2 goes by the batch.
        layers: the layers.
        terms: over how many relations the statistics were taken.
    """
    w, norm = layers.weight1.double(), layers.norm2
    bias = sums[:, -1]
    weight = norm.deviation * ((sums[:, :-1] * w).sum(1) - norm.mean * bias)
    grad_w, direct = sums[:, :-1], norm.scale[:, None] * w
    indirect, constant = w.new_zeros(w.shape[1], w.shape[1]), w.new_zeros(w.shape[1])
    if norm.by_batch:
        share = norm.deviation * weight / terms
        mean_z = gram[-1, :-1]
        correlation = w @ gram[:-1, :-1] - torch.outer(norm.mean, mean_z)
        grad_w = grad_w - torch.outer(bias / terms, mean_z) - share[:, None] * correlation
        indirect = w.T @ (share[:, None] * direct)
        constant = (bias / terms - norm.mean * share) @ direct
    grad_w = norm.scale[:, None] * grad_w
    return Closing(weight, bias, grad_w, direct, indirect, constant)


def close1(
    sums_q: Tensor, sums_k: Tensor, q: Tensor, k: Tensor, norm: Normalised, window: Window
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Close the backward pass of the first normalisation.

    Args:
        sums_q: (N, C, H, W), the sum of the gradient behind norm1 over every centre's taps.
        sums_k: the negative sum of it over all windows' taps that are this pixel.
        q: the centres.
        k: the neighbours.
        norm: the first normalisation.
        window: the windows.

    Returns:
        The gradients of q and k, and of norm's scale and shift, all in float64.
    """
    boxes = _boxes(window, q)
    counts = boxes[0].sum(0)[:, None] * boxes[1].sum(0)
    terms = q[:, 0].numel() * window.taps
    sums_q, sums_k, q, k = (x.double() for x in (sums_q, sums_k, q, k))
    mean_q = q.mean((0, 2, 3))
    q, k = q - _channels(mean_q), k - _channels(mean_q - norm.mean)
    bias = sums_q.sum((0, 2, 3))
    weight = norm.deviation * (sums_q * q + sums_k * k).sum((0, 2, 3))
    if norm.by_batch:
        shift, share = _channels(bias / terms), _channels(norm.deviation * weight / terms)
        transposed = (boxes[0].T, boxes[1].T)
        centred_q = window.taps * q - _sum_windows(k, boxes)
        centred_k = _sum_windows(q, transposed) - counts * k
        sums_q = sums_q - window.taps * shift - share * centred_q
        sums_k = sums_k + counts * shift + share * centred_k
    scale = _channels(norm.scale)
    return scale * sums_q, scale * sums_k, (weight, bias)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, value: Tensor, layers: Layers, gram: Tensor, window: Window
) -> Gradients:
    """Return the gradients for grad, (N, C, H, W), that of the output."""
    rel = layers.weight1.shape[0]
    sums2 = gram.new_zeros(rel, rel + 3)
    grad_weight2 = gram.new_zeros(layers.weight2.shape)
    grad_values = []
    for part in _parts(q, window):
        z = _relu_relation(q[part], k[part], layers.norm1, window)
        h = layers.hidden(z)
        grad_logits, grad_value = _backward_of_sums(grad[part], value[part], layers, h, window)
        grad_values.append(grad_value)
        grad_weight2 += _outer(grad_logits, h).double()
        slope = _behind_norm2(grad_logits, h, layers)
        sums2 += _outer(slope, F.pad(z, (0, 1), value=1.0)).double()
    closing = close2(sums2, gram, layers, q[:, 0].numel() * window.taps)
    sums = [
        _relation_sums(grad[part], q[part], k[part], value[part], layers, closing, window)
        for part in _parts(q, window)
    ]
    sums_q, sums_k = (torch.cat(each) for each in zip(*sums, strict=True))
    grad_q, grad_k, norm1 = close1(sums_q, sums_k, q, k, layers.norm1, window)
    norm2 = (closing.weight, closing.bias)
    planes = (grad_q[:, :rel], grad_k[:, :rel], torch.cat(grad_values))
    grad_position = (grad_q[:, rel:] + grad_k[:, rel:]).sum(0, keepdim=True)
    return Gradients(*planes, grad_position, norm1, closing.weight1, norm2, grad_weight2)


def _relation_sums(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    value: Tensor,
    layers: Layers,
    closing: Closing,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """Return for some images what `close1` takes as sums_q and sums_k."""
    z = _relu_relation(q, k, layers.norm1, window)
    h = layers.hidden(z)
    grad_logits, _ = _backward_of_sums(grad, value, layers, h, window)
    slope = _behind_norm2(grad_logits, h, layers)
    direct, indirect, constant = (
        x.to(z.dtype) for x in (closing.direct, closing.indirect, closing.constant)
    )
    grad_z = slope @ direct - z @ indirect - constant
    slope = grad_z.masked_fill_(z <= 0, 0)
    return slope.sum(1).movedim(-1, 1), _fold_taps(-slope, window).movedim(-1, 1)


def _backward_of_sums(
    grad: Tensor, value: Tensor, layers: Layers, h: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the logits, (n, K*K, H, W, Cw), and of the values, (n, C, H, W)."""
    weights = layers.weights(h)
    slopes = _grouped(grad.to(h.dtype).movedim(1, -1)[:, None], weights)
    grad_weights = (slopes * _grouped(_taps(value, window), weights)).sum(-2)
    delta = (weights * grad_weights).sum(1, keepdim=True)
    grad_value = _fold_taps((weights[..., None, :] * slopes).flatten(-2), window)
    return weights * (grad_weights - delta), grad_value.movedim(-1, 1)


def _behind_norm2(grad_logits: Tensor, h: Tensor, layers: Layers) -> Tensor:
    return (grad_logits @ layers.weight2.to(h.dtype)).masked_fill_(h <= 0, 0)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Sum up a b^T over all but the last dimension."""
    return a.flatten(0, -2).T @ b.flatten(0, -2)


def _relu_relation(q: Tensor, k: Tensor, norm: Normalised, window: Window) -> Tensor:
    """Return z, (n, K*K, H, W, C), in the accumulation dtype."""
    # Taking each image's mean away first keeps what is left of the difference of two large values.
    dtype = accumulation_dtype(q.dtype)
    mean_q = q.double().mean((2, 3), keepdim=True)
    centred_q = (q.double() - mean_q) * _channels(norm.scale)
    centred_q += _channels(norm.shift + norm.scale * norm.mean)
    centred_k = (k.double() - mean_q + _channels(norm.mean)) * _channels(norm.scale)
    taps = _taps(centred_k.to(dtype), window)
    return (centred_q.to(dtype).movedim(1, -1)[:, None] - taps).relu_()


def _taps(x: Tensor, window: Window) -> Tensor:
    """Return what the windows' taps read of (n, C, H, W): (n, K*K, H, W, C)."""
    views = window.views(window.pad(x.to(accumulation_dtype(x.dtype))))
    return views.flatten(2, 3).movedim(1, -1)


def _fold_taps(taps: Tensor, window: Window) -> Tensor:
    """Apply the adjoint of `_taps`: (n, K*K, H, W, C) becomes (n, H, W, C)."""
    batch, _, height, width, channels = taps.shape
    padded = taps.new_zeros(batch, channels, *window.padded_size(height, width))
    for view, tap in zip(window.tap_views(padded), taps.unbind(1), strict=True):
        view.add_(tap.movedim(-1, 1))
    return window.fold(padded).movedim(1, -1)


def _grouped(x: Tensor, weights: Tensor) -> Tensor:
    """View (..., C) as (..., C // Cw, Cw): weight channel c % Cw serves channel c."""
    return x.unflatten(-1, (-1, weights.shape[-1]))


def _parts(x: Tensor, window: Window) -> Iterator[slice]:
    """Yield the images by parts."""
    images = max(1, AT_ONCE // (4 * window.taps * max(x[:1].numel(), 1)))
    for first in range(0, x.shape[0], images):
        yield slice(first, first + images)


def _channels(x: Tensor) -> Tensor:
    return x[:, None, None]


def _boxes(window: Window, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often the windows of each row read each row, and those of each column."""

    def box(side: int) -> Tensor:
        taps = torch.arange(window.kernel_size, device=x.device) - window.padding
        read = (torch.arange(side, device=x.device)[:, None] + taps).abs()
        read = side - 1 - (side - 1 - read).abs()
        return F.one_hot(read, side).sum(1).double()

    return box(x.shape[2]), box(x.shape[3])


def _sum_windows(x: Tensor, boxes: tuple[Tensor, Tensor]) -> Tensor:
    """Sum up what the windows of x read, or the transpose of that."""
    return boxes[0] @ x @ boxes[1].T
