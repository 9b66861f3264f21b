"""What pairwise attention's kernels compute of whole planes, on threads of a CPU.

Planes are larger than those of `test_ops_attention_on_cpu.py`: several bands of rows and blocks of
columns, the last ones not whole.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from pairwise_oracle import EPS, Inputs, PairwiseCase, draw, relation, unfold
from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.kernels import pairwise_planes
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_saved import Planes

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.usefixtures("_kernels_on_cpu"),
]

CASES = [
    (torch.float32, PairwiseCase("bands", 16, 8, 70, 9, 7, layout="channels_last")),
    (torch.bfloat16, PairwiseCase("smallest", 16, 8, 4, 21, 7, layout="channels_last")),
    (torch.float32, PairwiseCase("blocks", 4, 2, 33, 70, 3, layout="channels_last")),
    (torch.float16, PairwiseCase("padded", 12, 8, 40, 3, 5, layout="channels_last")),
    (torch.float32, PairwiseCase("wide", 128, 64, 5, 11, 3, layout="channels_last")),
]
each_case = pytest.mark.parametrize(("dtype", "case"), CASES, ids=[c.name for _, c in CASES])


def draw_planes(dtype: torch.dtype, case: PairwiseCase) -> tuple[Inputs, Inputs, Layout]:
    """Planes away from zero with parameters in float32, the same in float64, and their layout."""
    inputs = draw(case, lambda query, key: (query + 3, key - 2)).converted(
        "cpu", dtype, torch.float32
    )
    sides = case.height, case.width
    layout = Layout(case.batch, *sides, case.rel, case.shared, case.channels, case.kernel_size)
    return inputs, inputs.converted("cpu", torch.float64, torch.float64), layout


def planes_of(inputs: Inputs) -> Planes:
    return Planes(inputs.query.detach(), inputs.key.detach(), inputs.position.detach())


def in_layout(slopes: Tensor, layout: Layout) -> Tensor:
    """Slopes (N, channels + 2, H, W) as the kernels lay them out, filled up with NaN."""
    laid_out = torch.full((layout.images, layout.plane, layout.size), torch.nan)
    pixels, positions = slopes.flatten(2).movedim(1, 2), layout.rel or layout.relation
    laid_out[..., : layout.relation] = pixels[..., :-2]
    laid_out[..., positions : positions + 2] = pixels[..., -2:]
    return laid_out


@each_case
def test_planes_are_folded(dtype: torch.dtype, case: PairwiseCase) -> None:
    inputs, exact, layout = draw_planes(dtype, case)
    scale, bias = inputs.norm1.weight.detach(), inputs.norm1.bias.detach()
    folded, affine, mean, variance = pairwise_planes.fold(
        planes_of(inputs), layout, scale, bias, None, None, EPS
    )
    related = relation(exact).detach()
    torch.testing.assert_close(mean.double(), related.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        variance.double(), related.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5
    )
    normalised = F.batch_norm(related, None, None, scale.double(), bias.double(), True, 0, EPS)
    query, key = folded.double().unflatten(1, (case.batch, layout.plane)).movedim(-1, 2)
    taps = unfold(key.unflatten(2, (case.height, case.width)), case.kernel_size)
    found = query[:, :, None] - taps
    # The tail's factors and summands are for what the planes lack.
    base = layout.rel or case.rel
    tail = affine.double().unflatten(0, (2, -1))[:, base - layout.rel :][:, :2, None, None]
    positions = tail[0] * found[:, base : base + 2] + tail[1]
    bound = 4e-3 * normalised.abs().max()
    assert (found[:, : case.rel] - normalised[:, : case.rel]).abs().max() < bound
    assert (positions - normalised[:, case.rel :]).abs().max() < bound
    assert not found[:, base + 2 :].any()


@pytest.mark.parametrize("by_batch", [True, False])
@each_case
def test_planes_are_closed(dtype: torch.dtype, case: PairwiseCase, by_batch: bool) -> None:
    inputs, exact, layout = draw_planes(dtype, case)
    related, norm = relation(exact), exact.norm1
    mean, variance = related.mean((0, 2, 3)).detach(), related.var((0, 2, 3), correction=0).detach()
    fixed = (None, None) if by_batch else (mean, variance)
    normalised = F.batch_norm(related, fixed[0], fixed[1], norm.weight, norm.bias, by_batch, 0, EPS)
    slopes = torch.randn_like(normalised)
    leaves = [exact.query, exact.key, exact.position, norm.weight, norm.bias]
    expected = torch.autograd.grad(normalised, leaves, slopes)
    of_queries = slopes.sum(2).unflatten(2, (case.height, case.width))
    read = torch.zeros_like(of_queries, requires_grad=True)
    (of_keys,) = torch.autograd.grad(unfold(read, case.kernel_size), read, -slopes)
    sums = in_layout(of_queries, layout), in_layout(of_keys, layout)
    parameters = inputs.norm1.weight.detach(), inputs.norm1.bias.detach()
    given = Norm(*parameters, mean.float(), variance.float(), EPS)
    closed = pairwise_planes.close(planes_of(inputs), layout, sums, given, by_batch)
    found = (closed.query, closed.key, closed.position, closed.weight, closed.bias)
    for actual, truth in zip(found, expected, strict=True):
        rounding = torch.finfo(actual.dtype).eps
        bound = (rounding + 3e-6) * truth.abs().max()
        assert (actual.double() - truth).abs().max() < bound
