"""Patchwise attention by torch's own functions, and inputs for it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from op_cases import laid_out, moved
from torch import Tensor

from sanctl_ops import Norm, patchwise_attention

PARAMETERS = ("norm1.weight", "norm1.bias", "weight1", "norm2.weight", "norm2.bias")
LEAVES = ("query", "key", "value", *PARAMETERS, "weight2", "bias2")


@dataclass(frozen=True)
class Inputs:
    """The arguments of `patchwise_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    norm1: Norm
    weight1: Tensor
    norm2: Norm
    weight2: Tensor
    bias2: Tensor
    kernel_size: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients flow to, in the order of LEAVES."""
        norms = (self.norm1.weight, self.norm1.bias, self.weight1, *self.norm2[:2])
        return [self.query, self.key, self.value, *norms, self.weight2, self.bias2]

    def to(self, device: str, dtype: torch.dtype, parameters: torch.dtype) -> "Inputs":
        """Return leaves on a device, the images of one type and the parameters of another."""

        def norm(n: Norm) -> Norm:
            mean, variance = (None if t is None else t.to(device, parameters) for t in n[2:4])
            return Norm(leaf(n.weight, parameters), leaf(n.bias, parameters), mean, variance, n.eps)

        def leaf(t: Tensor, kind: torch.dtype) -> Tensor:
            return moved(t.detach(), device, kind).requires_grad_()

        return Inputs(
            leaf(self.query, dtype),
            leaf(self.key, dtype),
            leaf(self.value, dtype),
            norm(self.norm1),
            leaf(self.weight1, parameters),
            norm(self.norm2),
            leaf(self.weight2, parameters),
            leaf(self.bias2, parameters),
            self.kernel_size,
        )


@dataclass(frozen=True)
class Case:
    """Shapes: `hidden` is Cw, and `share` value channels have one weight."""

    name: str
    height: int
    width: int
    kernel_size: int
    relation: int = 4
    hidden: int = 2
    share: int = 8
    batch: int = 2
    training: bool = True
    layout: str = "channels_last"
    offset: float = 0.3
    scale: float = 1.0

    def inputs(self, seed: int = 0) -> Inputs:
        """Draw leaves in float64."""
        torch.manual_seed(seed)
        channels = self.relation * (self.kernel_size**2 + 1)
        taps = self.kernel_size**2
        query, key = self._image(self.relation), self._image(self.relation)
        value = self._image(self.hidden * self.share)
        weight1 = _drawn(self.hidden, channels) * channels**-0.5
        norm1, norm2 = self._norm(channels), self._norm(self.hidden)
        weight2 = _drawn(self.hidden * taps, self.hidden) * self.hidden**-0.5 / self.kernel_size
        bias2 = 0.2 * _drawn(self.hidden * taps)
        drawn = Inputs(query, key, value, norm1, weight1, norm2, weight2, bias2, self.kernel_size)
        return drawn.to("cpu", torch.float64, torch.float64)

    def _image(self, channels: int) -> Tensor:
        shape = (self.batch, channels, self.height, self.width)
        drawn = laid_out(shape, self.layout)
        return moved(drawn, "cpu", torch.float64).mul_(self.scale).add_(self.offset * self.scale)

    def _norm(self, channels: int) -> Norm:
        weight, bias = 1 + 0.3 * _drawn(channels), 0.3 * _drawn(channels)
        if self.training:
            return Norm(weight, bias, None, None, 1e-5)
        mean, variance = 0.3 * _drawn(channels), _drawn(channels).abs() + 0.5
        return Norm(weight, bias, mean, variance, 1e-5)


CASES = [
    Case("smallest_3x3", 2, 2, 3),
    Case("smallest_5x5", 3, 3, 5),
    Case("smallest_7x7", 4, 4, 7),
    Case("odd_sides_3x3", 5, 9, 3),
    Case("odd_sides_5x5", 7, 4, 5, relation=3, hidden=3, share=2),
    Case("odd_sides_7x7", 5, 8, 7),
    Case("wider", 7, 7, 7, relation=16, hidden=8),
    Case("one_image", 6, 6, 3, batch=1),
    Case("contiguous", 6, 7, 3, layout="contiguous"),
    Case("sliced", 6, 7, 3, layout="sliced"),
    Case("some_channels_last", 6, 7, 3, layout="some_channels_last"),
]
CASES += [replace(case, name=f"{case.name}_evaluated", training=False) for case in CASES[2:7:2]]
HOSTILE = [
    Case("far_from_zero", 8, 8, 7, offset=100.0),
    Case("nearly_constant", 8, 8, 7, offset=1000.0, scale=1e-3),
    Case("large", 8, 8, 3, scale=1e3),
]


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def expected(x: Inputs) -> Tensor:
    """Return patchwise attention as it is defined, in the type of the inputs."""
    batch, _, height, width = x.query.shape
    taps, hidden = x.kernel_size**2, x.weight1.shape[0]
    weights = F.conv2d(_before_relu(x).relu(), x.weight2[:, :, None, None], x.bias2)
    weights = weights.view(batch, 1, hidden, taps, -1)
    values = _unfolded(x.value, x.kernel_size).view(batch, -1, hidden, taps, height * width)
    return (weights * values).sum(3).view_as(x.value.contiguous())


def _before_relu(x: Inputs) -> Tensor:
    """Return what the second ReLU takes, (N, Cw, 1, P)."""
    batch, relation = x.query.shape[:2]
    query = x.query.reshape(batch, relation, 1, -1)
    taps = _unfolded(x.key, x.kernel_size).reshape(batch, -1, 1, query.shape[3])
    related = _normalised(torch.cat((query, taps), 1), x.norm1).relu()
    return _normalised(F.conv2d(related, x.weight1[:, :, None, None]), x.norm2)


def away_from_kinks(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Draw images of a type of 16 bits, whose rounding does not decide what the second ReLU keeps.

    In these few pixels a single decision shows in the gradients, however exact all else is.
    """
    for seed in range(1000):
        x = case.inputs(seed).to(device, dtype, torch.float32)
        with torch.no_grad():
            if _before_relu(x.to("cpu", torch.float64, torch.float64)).abs().min() > 2e-3:
                return x
    raise AssertionError(f"{case.name} always comes too near a kink")


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    by_batch = norm.mean is None
    return F.batch_norm(x, *norm[2:4], *norm[:2], by_batch, 0.0, norm.eps)


def _unfolded(x: Tensor, size: int) -> Tensor:
    """Return (N, C, K*K, P)."""
    padded = F.pad(x.contiguous(), [size // 2] * 4, mode="reflect")
    return F.unfold(padded, size).view(*x.shape[:2], size * size, -1)


def differentiated(x: Inputs, out: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradient of every leaf, by name."""
    gradients = torch.autograd.grad(out, x.leaves, grad.to(out))
    return {"out": out.detach()} | dict(zip(LEAVES, gradients, strict=True))


def distances(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Return for every tensor how far it is from the truth, in parts of the truth's norm."""
    pairs = {name: (actual[name].detach().double().cpu(), t.cpu()) for name, t in truth.items()}
    return {
        name: float((a - t).norm() / t.norm().clamp_min(1e-30)) for name, (a, t) in pairs.items()
    }


def attended(x: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """Run the operator in both directions."""
    return differentiated(x, patchwise_attention(*x.arguments).out, grad)
