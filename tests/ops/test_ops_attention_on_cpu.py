"""The arithmetic of attention's kernels where there is no GPU: on threads of a CPU."""

import shutil
from dataclasses import replace

import pytest
import torch
from kernels_on_cpu import Launcher
from pairwise_oracle import PairwiseCase, distance, draw, fused, gradients, unfused
from patchwise_cases import Case as PatchwiseCase
from patchwise_cases import (
    Inputs,
    attended,
    away_from_kinks,
    differentiated,
    distances,
    expected,
)
from saved_cases import PAIRWISE

from sanctl_ops import patchwise_attention
from sanctl_ops.kernels import pairwise_sums

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PATCHWISE_CASES = [
    (torch.bfloat16, PatchwiseCase("narrow", 18, 5, 3, batch=1)),
    (torch.bfloat16, PatchwiseCase("tiles", 15, 5, 3, relation=5, hidden=3, share=5, batch=1)),
    (torch.float16, PatchwiseCase("wide", 4, 5, 5, 20, 12, 3, 1, training=False, layout="sliced")),
]


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize(
    ("dtype", "case"), PATCHWISE_CASES, ids=[f"{d}-{c.name}" for d, c in PATCHWISE_CASES]
)
def test_patchwise_kernels_agree_with_autograd(
    dtype: torch.dtype, case: PatchwiseCase, launcher: Launcher
) -> None:
    x = away_from_kinks(case, "cpu", dtype)
    truth = x.to("cpu", torch.float64, torch.float64)
    out = expected(truth)
    grad = torch.randn_like(out).to(dtype)
    launched = len(launcher.launched)
    far = distances(attended(x, grad), differentiated(truth, out, grad.double()))
    assert len(launcher.launched) > launched + 20
    # Images are rounded to their type; all else comes of sums of products of halves.
    assert max(far.values()) < (3e-3 if dtype == torch.bfloat16 else 1.5e-3), far


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("case", [case for _, case in PATCHWISE_CASES[:2]], ids=lambda c: c.name)
def test_patchwise_kernels_stay_finite_beside_running_statistics(
    case: PatchwiseCase, launcher: Launcher
) -> None:
    """Without the batch's own statistics, nothing keeps what one image makes of itself small."""
    x = replace(case, training=False).inputs().to("cpu", torch.bfloat16, torch.float32)
    usual = patchwise_attention(*x.arguments).out
    with torch.no_grad():
        for image, factor in ((x.query, 1e6), (x.key, 1e6), (x.value, 100)):
            image[..., 0, 0] *= factor
    launched = len(launcher.launched)
    out = patchwise_attention(*x.arguments).out
    assert any("patchwise" in kernel.source for kernel in launcher.launched[launched:])
    assert out.isfinite().all()
    torch.testing.assert_close(out[..., 2:, :], usual[..., 2:, :], rtol=2**-7, atol=2**-7)


# Pixels of one access and of several; one channel, two or eight by one access; far from zero, where
# halves need a pivot of few digits, and farther, where they need many.
FLOAT32_CASES = [
    PatchwiseCase("narrow, far", 18, 5, 3, batch=1, offset=100),
    PatchwiseCase("tiles", 15, 5, 3, relation=5, hidden=3, share=5, batch=1),
    PatchwiseCase("wide", 4, 5, 3, 20, 12, 3, 1, training=False, layout="sliced"),
    PatchwiseCase("far", 8, 9, 3, 16, 8, batch=1, offset=100),
]
FARTHER = PatchwiseCase("farther", 8, 9, 3, 16, 8, batch=1, offset=3e4)


def errors_in_float32(x: Inputs, launcher: Launcher) -> dict[str, float]:
    """Run the kernels with TF32 allowed, and return how far they are from the truth."""
    torch.set_float32_matmul_precision("high")
    truth = x.to("cpu", torch.float64, torch.float64)
    out = expected(truth)
    grad = torch.randn_like(out).float()
    launched = len(launcher.launched)
    far = distances(attended(x, grad), differentiated(truth, out, grad.double()))
    assert len(launcher.launched) > launched + 20
    return far


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("case", FLOAT32_CASES, ids=lambda case: case.name)
def test_patchwise_kernels_are_as_exact_in_float32_as_in_halves(
    case: PatchwiseCase, launcher: Launcher
) -> None:
    x = away_from_kinks(case, "cpu", torch.float16).to("cpu", torch.float32, torch.float32)
    far = errors_in_float32(x, launcher)
    assert max(far.values()) < 1.5e-3, far


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("case", [FLOAT32_CASES[-1], FARTHER], ids=lambda case: case.name)
def test_patchwise_kernels_round_float32_to_halves(case: PatchwiseCase, launcher: Launcher) -> None:
    far = errors_in_float32(away_from_kinks(case, "cpu", torch.float32), launcher)
    # What the first ReLU keeps may change by it, which shows before it.
    before = {name: far.pop(name) for name in ("query", "key", "norm1.weight", "norm1.bias")}
    assert max(far.values()) < 2e-3, far
    assert max(before.values()) < 4e-2, before


@pytest.mark.usefixtures("_kernels_on_cpu")
def test_patchwise_kernels_leave_float32_exact_without_tf32(launcher: Launcher) -> None:
    x = FLOAT32_CASES[1].inputs().to("cpu", torch.float32, torch.float32)
    truth = x.to("cpu", torch.float64, torch.float64)
    out = expected(truth)
    launched = len(launcher.launched)
    far = distances(attended(x, torch.ones_like(x.value)), differentiated(truth, out, out * 0 + 1))
    assert not any("patchwise" in kernel.source for kernel in launcher.launched[launched:])
    assert max(far.values()) < 1e-5, far


@pytest.mark.usefixtures("_kernels_on_cpu")
def test_patchwise_kernels_read_no_channels_beyond_the_weights() -> None:
    """Weight channels are filled up to a power of two of tiles, whatever lies beside them."""
    case = PatchwiseCase("filled", 3, 4, 3, relation=4, hidden=24, share=1, batch=1)
    x = case.inputs().to("cpu", torch.float16, torch.float32)
    beside = torch.full((1, 32, 3, 4), torch.nan, dtype=torch.float16)
    beside = beside.contiguous(memory_format=torch.channels_last)
    value = beside[:, :24].copy_(x.value.detach())
    out = patchwise_attention(x.query, x.key, value, *x.arguments[3:]).out
    gradients = torch.autograd.grad(out, [x.query, x.weight2], torch.ones_like(out))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("_kernels_on_cpu")
def test_patchwise_kernels_keep_to_the_channels_of_an_image() -> None:
    """Relations are filled up to whole tiles, whatever lies beside them in memory."""
    case = PatchwiseCase("filled", 3, 4, 3, relation=8, hidden=9, share=1, batch=1)
    x = case.inputs().to("cpu", torch.float16, torch.float32)
    beside = torch.full((1, 24, 3, 4), torch.nan, dtype=torch.float16)
    query, key = (
        beside.contiguous(memory_format=torch.channels_last)[:, :8].copy_(image.detach())
        for image in (x.query, x.key)
    )
    assert patchwise_attention(query, key, *x.arguments[2:]).out.isfinite().all()


# Channels that are padded, weights that repeat in a quad of lanes, a last tile of fewer rows; and
# taps two at once, with one left over.
REPEATED = PairwiseCase("repeated", 12, 4, 9, 15, 3, batch=1, layout="channels_last")
NARROW = PairwiseCase("narrow", 4, 2, 17, 20, 3, layout="channels_last")
PAIRWISE_CASES = [
    (torch.bfloat16, NARROW),
    (torch.float16, PairwiseCase("narrow, smallest", 3, 2, 2, 2, 3, batch=3)),
    (torch.float32, NARROW),
    (torch.bfloat16, REPEATED),
    (torch.float32, REPEATED),
    (torch.bfloat16, PairwiseCase("two taps", 64, 32, 6, 9, 3, group=2, batch=1)),
]


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize(
    ("dtype", "case"), PAIRWISE_CASES, ids=[f"{d}-{c.name}" for d, c in PAIRWISE_CASES]
)
def test_kernels_of_pairwise_attention(
    dtype: torch.dtype, case: PairwiseCase, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    inputs = draw(case).converted("cpu", dtype, torch.float32)
    launched = len(launcher.launched)
    out = fused(inputs).out
    grad = torch.randn(out.shape).to(dtype)
    found = {"out": out} | gradients(out, inputs, grad)
    sources = {kernel.source for kernel in launcher.launched[launched:]}
    narrow = {"pairwise_narrow.cu", "pairwise_narrow_relation.cu"}
    if case.name.startswith("narrow"):
        assert narrow < sources
        assert len(sources) == 7
    else:
        assert not narrow & sources
        assert len(sources) == 10
    monkeypatch.undo()
    exact = inputs.converted("cpu", torch.float64, torch.float64)
    kept = inputs.converted("cpu", dtype, torch.float32)
    out, rounded = unfused(exact), unfused(kept, torch.bfloat16)
    expected = {"out": out} | gradients(out, exact, grad)
    autocast = {"out": rounded} | gradients(rounded, kept, grad)
    del found["bias2"]
    for name, actual in found.items():
        apart = distance(actual, expected[name])
        assert apart < distance(autocast[name], expected[name]) + 2**-9, name
        assert apart < 0.1, name


@pytest.mark.usefixtures("_kernels_on_cpu")
def test_pairwise_kernels_read_values_among_other_channels() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    inputs = draw(PAIRWISE).converted("cpu", torch.float32, torch.float32)
    images, channels, height, width = inputs.value.shape
    wide = torch.full((images, height, width, 16 + channels), torch.nan).movedim(-1, 1)
    among = wide[:, 16:].copy_(inputs.value.detach()).requires_grad_()
    assert pairwise_sums.pixels_of(among).data_ptr() == among.data_ptr(), "copied"
    out, expected = fused(replace(inputs, value=among)).out, fused(inputs).out
    assert out.equal(expected)
    grad = torch.randn(out.shape)
    (found,) = torch.autograd.grad(out, among, grad)
    assert found.equal(*torch.autograd.grad(expected, inputs.value, grad))


# Few enough values that rounding puts none on the other side of a ReLU.
DECIDED = PairwiseCase("decided", 4, 2, 9, 6, 5, layout="sliced")


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("offset", [0, 100])
def test_float32_planes_of_pairwise_attention(offset: float, launcher: Launcher) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    drawn = draw(DECIDED, lambda query, key: (query + offset, key - offset))
    inputs = drawn.converted("cpu", torch.float32, torch.float32)
    launched = len(launcher.launched)
    out = fused(inputs).out
    grad = torch.randn(out.shape)
    assert len({kernel.source for kernel in launcher.launched[launched:]}) == 6
    # What the kernels have saved is theirs, whatever is allowed later.
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {"out": out} | gradients(out, inputs, grad)
    exact = inputs.converted("cpu", torch.float64, torch.float64)
    out = unfused(exact)
    expected = {"out": out} | gradients(out, exact, grad)
    del found["bias2"]
    for name, actual in found.items():
        # Positive and negative terms of parameters' gradients nearly cancel.
        bound = 1.5e-3 if name in ("out", "query", "key", "value", "position") else 5e-3
        assert distance(actual, expected[name]) < bound, name
    assert all(actual.dtype == torch.float32 for actual in found.values())


@pytest.mark.usefixtures("_kernels_on_cpu")
def test_exact_products_of_float32_stay_with_the_formulas(launcher: Launcher) -> None:
    inputs = draw(DECIDED).converted("cpu", torch.float32, torch.float32)
    launched = len(launcher.launched)
    out = fused(inputs).out
    grad = torch.randn(out.shape)
    found = {"out": out} | gradients(out, inputs, grad)
    assert len(launcher.launched) == launched
    exact = inputs.converted("cpu", torch.float64, torch.float64)
    out = unfused(exact)
    expected = {"out": out} | gradients(out, exact, grad)
    del found["bias2"]
    assert max(distance(actual, expected[name]) for name, actual in found.items()) < 1e-5
