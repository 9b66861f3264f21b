"""What pairwise attention's kernels compute of whole planes, on threads of a CPU.

Planes are larger than those of `test_ops_attention_on_cpu.py`: several bands of rows and blocks of
columns, the last ones not whole.
"""

import shutil
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels import pairwise_planes
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_saved import Planes

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.usefixtures("_kernels_on_cpu"),
]

EPS = 1e-5
IMAGES = 2
CASES = [
    (torch.float32, 16, 7, (70, 9)),
    (torch.bfloat16, 16, 7, (4, 21)),
    (torch.float32, 4, 3, (33, 70)),
    (torch.float16, 12, 5, (40, 3)),
    (torch.float32, 128, 3, (5, 11)),
]


def relation(query: Tensor, key: Tensor, position: Tensor, size: int) -> Tensor:
    """Queries less the keys of their windows, (N, channels + 2, K * K, H * W)."""
    position = position.expand(IMAGES, -1, -1, -1)
    centres, read = torch.cat((query, position), 1), torch.cat((key, position), 1)
    taps = F.unfold(F.pad(read, [size // 2] * 4, mode="reflect"), size)
    return centres.flatten(2)[:, :, None] - taps.unflatten(1, (-1, size * size))


@dataclass
class Drawn:
    """Planes, the first normalisation's parameters, and all of it in float64."""

    planes: Planes
    layout: Layout
    weight: Tensor
    bias: Tensor
    exact: list[Tensor]
    size: int

    @property
    def relation(self) -> Tensor:
        query, key, position = self.exact
        return relation(query, key, position, self.size)


def draw(dtype: torch.dtype, channels: int, size: int, sides: tuple[int, int]) -> Drawn:
    torch.manual_seed(0)
    shapes = [(IMAGES, *sides, channels)] * 2 + [(1, *sides, 2)]
    drawn = [
        (torch.randn(shape) * scale + offset).to(dtype).movedim(-1, 1)
        for shape, scale, offset in zip(shapes, (1, 0.7, 0.5), (3, -2, 0), strict=True)
    ]
    weight, bias = torch.randn(2, channels + 2)
    layout = Layout(IMAGES, *sides, channels, 8, 64, size)
    exact = [x.double().requires_grad_() for x in drawn]
    return Drawn(Planes(*drawn), layout, weight, bias, exact, size)


def in_layout(slopes: Tensor, layout: Layout) -> Tensor:
    """Slopes (N, channels + 2, H, W) as the kernels lay them out, filled up with NaN."""
    laid_out = torch.full((IMAGES, layout.plane, layout.size), torch.nan)
    pixels, positions = slopes.flatten(2).movedim(1, 2), layout.rel or layout.relation
    laid_out[..., : layout.relation] = pixels[..., :-2]
    laid_out[..., positions : positions + 2] = pixels[..., -2:]
    return laid_out


@pytest.mark.parametrize(("dtype", "channels", "size", "sides"), CASES)
def test_planes_are_folded(
    dtype: torch.dtype, channels: int, size: int, sides: tuple[int, int]
) -> None:
    x = draw(dtype, channels, size, sides)
    folded, affine, mean, variance = pairwise_planes.fold(
        x.planes, x.layout, x.weight, x.bias, None, None, EPS
    )
    exact = x.relation.detach()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        variance.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5
    )
    normalised = F.batch_norm(exact, None, None, x.weight.double(), x.bias.double(), True, 0, EPS)
    query, key = folded.double().unflatten(1, (IMAGES, x.layout.plane)).movedim(-1, 2)
    taps = F.pad(key.unflatten(2, sides), [size // 2] * 4, mode="reflect")
    found = query[:, :, None] - F.unfold(taps, size).unflatten(1, (-1, size * size))
    # The tail's factors and summands are for what the planes lack.
    base = x.layout.rel or channels
    tail = affine.double().unflatten(0, (2, -1))[:, base - x.layout.rel :][:, :2, None, None]
    positions = tail[0] * found[:, base : base + 2] + tail[1]
    bound = 4e-3 * normalised.abs().max()
    assert (found[:, :channels] - normalised[:, :channels]).abs().max() < bound
    assert (positions - normalised[:, channels:]).abs().max() < bound
    assert not found[:, base + 2 :].any()


@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize(("dtype", "channels", "size", "sides"), CASES)
def test_planes_are_closed(
    dtype: torch.dtype, channels: int, size: int, sides: tuple[int, int], by_batch: bool
) -> None:
    x = draw(dtype, channels, size, sides)
    exact = x.relation
    mean, variance = exact.mean((0, 2, 3)).detach(), exact.var((0, 2, 3), correction=0).detach()
    weight, bias = (p.double().requires_grad_() for p in (x.weight, x.bias))
    fixed = (None, None) if by_batch else (mean, variance)
    normalised = F.batch_norm(exact, fixed[0], fixed[1], weight, bias, by_batch, 0, EPS)
    slopes = torch.randn_like(normalised)
    expected = torch.autograd.grad(normalised, [*x.exact, weight, bias], slopes)
    of_queries = slopes.sum(2).unflatten(2, sides)
    nothing = torch.zeros(IMAGES, channels + 2, *sides, dtype=torch.float64, requires_grad=True)
    taps = F.unfold(F.pad(nothing, [size // 2] * 4, mode="reflect"), size)
    (of_keys,) = torch.autograd.grad(taps.unflatten(1, (-1, size * size)), nothing, -slopes)
    sums = in_layout(of_queries, x.layout), in_layout(of_keys, x.layout)
    norm = Norm(x.weight, x.bias, mean.float(), variance.float(), EPS)
    closed = pairwise_planes.close(x.planes, x.layout, sums, norm, by_batch)
    found = (closed.query, closed.key, closed.position, closed.weight, closed.bias)
    for actual, truth in zip(found, expected, strict=True):
        rounding = torch.finfo(actual.dtype).eps
        bound = (rounding + 3e-6) * truth.abs().max()
        assert (actual.double() - truth).abs().max() < bound
