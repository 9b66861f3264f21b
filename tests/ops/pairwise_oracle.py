"""Pairwise attention by its definition, in torch's built-ins, and inputs to hold it against."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from op_cases import laid_out, moved
from torch import Tensor

from sanctl_ops import Attention, Norm, pairwise_attention

EPS = 1e-5
NAMES = (
    *("query", "key", "value", "position", "norm1.weight", "norm1.bias", "weight1"),
    *("norm2.weight", "norm2.bias", "weight2", "bias2"),
)


@dataclass(frozen=True)
class PairwiseCase:
    """Shapes, and whether the normalisations go by running statistics."""

    name: str
    rel: int
    shared: int
    height: int
    width: int
    kernel_size: int
    group: int = 8
    batch: int = 2
    running1: bool = False
    running2: bool = False
    layout: str = "contiguous"

    @property
    def channels(self) -> int:
        return self.shared * self.group


CASES = [
    PairwiseCase("3x3", 4, 2, 7, 6, 3),
    PairwiseCase("5x5_odd_sides", 5, 3, 9, 5, 5, group=2),
    PairwiseCase("7x7_smallest", 6, 2, 4, 4, 7, batch=3),
    PairwiseCase("7x7_smallest_row", 6, 4, 4, 11, 7, group=1),
    PairwiseCase("3x3_smallest", 4, 2, 2, 2, 3),
    PairwiseCase("1x1", 3, 2, 3, 4, 1),
    PairwiseCase("evaluation", 4, 2, 6, 7, 5, running1=True, running2=True),
    PairwiseCase("running1", 4, 2, 6, 7, 3, running1=True),
    PairwiseCase("running2", 4, 2, 6, 7, 3, running2=True),
    PairwiseCase("channels_last", 8, 4, 7, 6, 3, layout="channels_last"),
    PairwiseCase("some_channels_last", 8, 4, 7, 6, 3, layout="some_channels_last"),
    PairwiseCase("sliced", 8, 4, 7, 6, 3, layout="sliced"),
]


@dataclass(frozen=True)
class Inputs:
    """Leaves that require gradients, as the operator takes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    position: Tensor
    norm1: Norm
    weight1: Tensor
    norm2: Norm
    weight2: Tensor
    bias2: Tensor
    kernel_size: int

    @property
    def leaves(self) -> list[Tensor]:
        norms = (self.norm1.weight, self.norm1.bias), (self.norm2.weight, self.norm2.bias)
        planes = (self.query, self.key, self.value, self.position)
        return [*planes, *norms[0], self.weight1, *norms[1], self.weight2, self.bias2]

    def fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def converted(self, device: str, planes: torch.dtype, parameters: torch.dtype) -> "Inputs":
        """Copy the inputs, planes and parameters each to a type."""

        def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
            return moved(x.detach(), device, dtype).requires_grad_()

        def norm(n: Norm) -> Norm:
            mean, variance = (None if x is None else x.to(device, parameters) for x in n[2:4])
            return Norm(leaf(n.weight, parameters), leaf(n.bias, parameters), mean, variance, n.eps)

        return Inputs(
            leaf(self.query, planes),
            leaf(self.key, planes),
            leaf(self.value, planes),
            leaf(self.position, planes),
            norm(self.norm1),
            leaf(self.weight1, parameters),
            norm(self.norm2),
            leaf(self.weight2, parameters),
            leaf(self.bias2, parameters),
            self.kernel_size,
        )


def draw(
    case: PairwiseCase,
    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda q, k: (q, k),
    seed: int = 0,
) -> Inputs:
    """Draw float64 inputs on the CPU; `spoil` makes query and key what they are in the end."""
    torch.manual_seed(seed)
    planes = (case.batch, case.rel, case.height, case.width)
    query, key = spoil(laid_out(planes, case.layout) + 0.3, laid_out(planes, case.layout) * 0.7)
    value = laid_out((case.batch, case.channels, case.height, case.width), case.layout)
    position = torch.randn(1, 2, case.height, case.width, dtype=torch.float64)
    weight1 = torch.randn(case.rel, case.rel + 2, dtype=torch.float64) / (case.rel + 2) ** 0.5
    weight2 = torch.randn(case.shared, case.rel, dtype=torch.float64) * 1.5 / case.rel**0.5
    bias2 = torch.randn(case.shared, dtype=torch.float64)
    norms = _norm(case.rel + 2, case.running1), _norm(case.rel, case.running2)
    inputs = Inputs(
        *(query, key, value, position, norms[0], weight1, norms[1], weight2, bias2),
        case.kernel_size,
    )
    return inputs.converted("cpu", torch.float64, torch.float64)


def _norm(channels: int, running: bool) -> Norm:
    weight, bias, mean, variance = torch.randn(4, channels, dtype=torch.float64).mul_(0.3)
    if running:
        return Norm(weight + 1, bias, mean, variance.abs() + 0.5, EPS)
    return Norm(weight + 1, bias, None, None, EPS)


def fused(inputs: Inputs) -> Attention:
    return pairwise_attention(*inputs.fields())


def unfold(x: Tensor, size: int) -> Tensor:
    """What the windows read of (N, C, H, W), reflected: (N, C, K * K, H * W)."""
    padded = F.pad(x, [size // 2] * 4, mode="reflect") if size > 1 else x
    return F.unfold(padded, size).unflatten(1, (-1, size * size))


def relation(inputs: Inputs) -> Tensor:
    """Queries less the keys of their windows, then positions: (N, rel + 2, K * K, H * W)."""
    position = inputs.position.expand(inputs.query.shape[0], -1, -1, -1)
    centres = torch.cat((inputs.query, position), 1).flatten(2)[:, :, None]
    return centres - unfold(torch.cat((inputs.key, position), 1), inputs.kernel_size)


def unfused(inputs: Inputs, kept: torch.dtype | None = None) -> Tensor:
    """Compute the output by the definition.

    `kept` is what every intermediate tensor is rounded to, as autocast does it; normalisations and
    the softmax compute as wide as the parameters are.
    """
    wide = inputs.weight1.dtype

    def rounded(x: Tensor) -> Tensor:
        return x if kept is None else x.to(kept).to(wide)

    def layer(x: Tensor, norm: Norm, weight: Tensor) -> Tensor:
        by_batch = norm.mean is None
        x = F.batch_norm(x, norm.mean, norm.variance, norm.weight, norm.bias, by_batch, 0, norm.eps)
        x = rounded(F.relu(rounded(x)))
        return rounded(torch.einsum("oc,ncjp->nojp", rounded(weight), x))

    value = inputs.value.to(wide)
    query, key, position = (x.to(wide) for x in (inputs.query, inputs.key, inputs.position))
    related = rounded(relation(replace(inputs, query=query, key=key, position=position)))
    hidden = layer(related, inputs.norm1, inputs.weight1)
    logits = layer(hidden, inputs.norm2, inputs.weight2)
    logits = rounded(logits + rounded(inputs.bias2)[:, None, None])
    weights = rounded(logits.softmax(2))
    taps = unfold(value, inputs.kernel_size).unflatten(1, (-1, weights.shape[1]))
    return rounded((weights[:, None] * taps).sum(3).reshape(value.shape))


def gradients(out: Tensor, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(out, inputs.leaves, grad.to(out))
    return dict(zip(NAMES, found, strict=True))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the relative distance, that of two zeros being 0."""
    expected = expected.detach().double().cpu()
    apart = (actual.detach().double().cpu() - expected).norm()
    return float(apart / expected.norm().clamp_min(1e-300))
