"""norm_pool and conv_norm_pool beside torch's own operators in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pooling_cases import (
    Inputs,
    PoolingCase,
    assert_same_nans,
    composed,
    decided,
    differentiated,
    draw,
    each_device,
    each_mode,
    each_operator,
    fused,
    output,
    statistics,
    truth,
)

CASES = [
    PoolingCase("even", 6, 8),
    PoolingCase("odd", 7, 5),
    PoolingCase("odd height", 9, 4, running=True),
    PoolingCase("one window", 2, 2),
    PoolingCase("one window of odd sides", 3, 3, batch=1),
    PoolingCase("single channels", 4, 6, channels=3, running=True),
    PoolingCase("slabs", 5, 6, channels=320),
    PoolingCase("several blocks", 34, 41, channels=24, batch=3),
    PoolingCase("far from zero", 16, 12, offset=200.0, std=2.0),
    PoolingCase("far from zero, running", 16, 12, offset=200.0, std=2.0, running=True),
    PoolingCase("contiguous", 5, 8, layout="contiguous"),
    PoolingCase("sliced", 5, 8, layout="sliced"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Rounding of a result, and what sums in float32 are off by, as a share of the largest one.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def check(inputs: Inputs, dtype: torch.dtype) -> None:
    """Hold values, statistics and gradients, which come of outputs that rounding decides not."""
    exact = truth(inputs, dtype)
    # Far from zero, float32 leaves a mean, and what lies around it, fewer digits.
    offset = exact.x.abs().mean() / exact.x.std(correction=0).clamp(min=1e-3)
    exponent = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    margin = (1e-12 if dtype == torch.float64 else 30 * exponent) * (1 + offset.item())
    clear = decided(exact, margin)
    grad = (torch.randn_like(clear) * clear).to(dtype).double()
    expected = differentiated(composed, exact, grad)
    actual = differentiated(output, inputs, grad)
    if inputs.norm.mean is None:
        found = zip(("mean", "variance"), fused(inputs)[1:], statistics(exact), strict=True)
        for name, value, wanted in found:
            actual[name], expected[name] = value.detach(), wanted.detach()
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape
        far = (actual[name].cpu().double() - wanted).abs().max()
        kept = dtype if name == "out" or (name == "first" and inputs.weight is None) else None
        tolerance = TOLERANCES[kept or torch.promote_types(dtype, torch.float32)]
        allowed = (tolerance + margin) * wanted.abs().max() + 2 * margin
        assert far <= allowed, (name, far, allowed)


@each_case
@each_operator
@each_device
def test_agrees_with_autograd(case: PoolingCase, image_channels: int | None, device: str) -> None:
    inputs = draw(replace(case, image_channels=image_channels))
    check(inputs.to(device, torch.float64, torch.float64), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case
@each_operator
@each_device
def test_every_dtype(
    case: PoolingCase, image_channels: int | None, dtype: torch.dtype, device: str
) -> None:
    check(
        draw(replace(case, image_channels=image_channels)).to(device, dtype, torch.float32), dtype
    )


@pytest.mark.parametrize("image_channels", [1, 2, 4, 5])
@each_device
def test_other_numbers_of_image_channels(image_channels: int, device: str) -> None:
    case = PoolingCase("", 5, 6, channels=16, image_channels=image_channels)
    check(draw(case).to(device, torch.float32, torch.float32), torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    batch=st.integers(1, 3),
    channels=st.integers(1, 17),
    image_channels=st.sampled_from([None, 1, 2, 3, 4]),
    running=st.booleans(),
    offset=st.sampled_from([0.0, -50.0]),
)
def test_any_shape(**drawn: Any) -> None:
    check(draw(PoolingCase("", **drawn)), torch.float64)


@each_operator
@each_mode
@each_device
def test_the_first_of_equals_takes_the_gradient(
    image_channels: int | None, running: bool, device: str
) -> None:
    inputs = draw(PoolingCase("", 9, 10, image_channels=image_channels, running=running))
    with torch.no_grad():
        inputs.x.round_().clamp_(-1, 1)
    check(inputs.to(device, torch.float32, torch.float32), torch.float32)


@each_operator
@each_device
def test_constant_images(image_channels: int | None, device: str) -> None:
    case = PoolingCase("", 5, 6, image_channels=image_channels, offset=3.0, std=0.0)
    inputs = draw(case).to(device, torch.float32, torch.float32)
    with torch.no_grad():
        inputs.norm.bias.abs_()
    out, mean, variance = fused(inputs)
    exact = truth(inputs, torch.float32)
    # What rounding leaves of 3 is multiplied by 1 / sqrt(eps).
    wanted = inputs.norm.bias.detach()[:, None, None].expand_as(out)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-4)
    torch.testing.assert_close(mean.cpu().double(), statistics(exact)[0], rtol=1e-6, atol=1e-6)
    assert variance.abs().max() < 1e-12
    first, weight, bias = torch.autograd.grad(out.sum(), inputs.leaves)
    torch.testing.assert_close(bias, torch.full_like(bias, out.numel() / out.shape[1]))
    assert weight.abs().max() < 1e-2
    if image_channels is None:
        # The first pixel of every window has what the statistics take from all.
        corner = first[:, :, :4:2, ::2]
        others = first.flatten(2).sum(2) - corner.flatten(2).sum(2)
        torch.testing.assert_close(corner.flatten(2).sum(2), -others, rtol=1e-4, atol=1e-4)
        scale = (inputs.norm.weight / inputs.norm.eps**0.5).detach()[:, None, None]
        torch.testing.assert_close(corner, (scale * (1 - 6 / 30)).expand_as(corner))


@each_operator
@each_mode
@each_device
def test_a_nan_stays_in_its_window_or_channel(
    image_channels: int | None, running: bool, device: str
) -> None:
    case = PoolingCase("", 6, 6, image_channels=image_channels, running=running)
    inputs = draw(case).to(device, torch.float32, torch.float32)
    with torch.no_grad():
        inputs.x[1, 2, 2, 3] = torch.nan
        inputs.x[1, 2, 3, 2] = torch.nan
    out = output(inputs)
    exact = truth(inputs, torch.float32)
    grad = torch.ones_like(out)
    actual = differentiated(output, inputs, grad)
    expected = differentiated(composed, exact, grad.cpu())
    assert_same_nans(inputs, actual, expected)


@each_operator
@each_device
def test_running_statistics_are_returned(image_channels: int | None, device: str) -> None:
    case = PoolingCase("", 4, 4, image_channels=image_channels, running=True)
    inputs = draw(case).to(device, torch.bfloat16, torch.float32)
    _, mean, variance = fused(inputs)
    assert inputs.norm.mean is not None
    assert inputs.norm.variance is not None
    assert mean.equal(inputs.norm.mean)
    assert variance.equal(inputs.norm.variance)
    assert not mean.requires_grad
    assert not variance.requires_grad


@each_device
def test_channels_of_an_image_that_are_alike(device: str) -> None:
    """Grey images: a difference of channels has variance 0, which only exact sums find."""
    inputs = draw(PoolingCase("", 40, 50, image_channels=3)).to(
        device, torch.float32, torch.float32
    )
    assert inputs.weight is not None
    with torch.no_grad():
        inputs.x[:] = inputs.x[:, :1]
        inputs.weight[0] = torch.tensor([1.0, -2.0, 1.0])
    _, mean, variance = fused(inputs)
    assert mean[0].abs() < 1e-6
    assert 0 <= variance[0] < 1e-12


@each_operator
@each_device
def test_two_runs_are_bit_identical(image_channels: int | None, device: str) -> None:
    case = PoolingCase("", 65, 64, channels=24, image_channels=image_channels, batch=5)
    inputs = draw(case).to(device, torch.bfloat16, torch.float32)
    grad = torch.sin(output(inputs).detach())
    first, second = (differentiated(output, inputs, grad) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@each_operator
@each_device
def test_a_tensor_need_not_begin_where_vectors_do(image_channels: int | None, device: str) -> None:
    case = PoolingCase("", 6, 6, image_channels=image_channels)
    inputs = draw(case).to(device, torch.bfloat16, torch.float32)
    shape, strides = inputs.x.shape, inputs.x.stride()
    storage = torch.zeros(inputs.x.numel() + 1, device=device, dtype=inputs.x.dtype)
    shifted = storage.as_strided(shape, strides, 1).copy_(inputs.x.detach())
    moved = replace(inputs, x=shifted.requires_grad_(image_channels is None))
    grad = torch.ones(145, device=device)[1:].view(2, 3, 3, 8).movedim(3, 1)
    first, second = (differentiated(output, x, grad) for x in (inputs, moved))
    assert all(first[name].equal(second[name]) for name in first)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_size_of_a_training_step(dtype: torch.dtype, image_channels: int | None) -> None:
    case = PoolingCase("", 112, 112, channels=64, image_channels=image_channels, batch=16)
    check(draw(case).to("cuda", dtype, torch.float32), dtype)


@pytest.mark.gpu
@on_gpu
@each_operator
def test_nothing_of_the_normalised_size_is_stored(image_channels: int | None) -> None:
    case = PoolingCase("", 64, 64, channels=256, image_channels=image_channels, batch=8)
    inputs = draw(case).to("cuda", torch.bfloat16, torch.float32)
    whole = 8 * 256 * 64 * 64 * inputs.x.itemsize

    def peak(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / whole

    out = output(inputs)
    grad = torch.randn_like(out)
    # Sums of the blocks take the rest.
    assert peak(lambda: output(inputs)) < 1 / 4 + 0.3
    backward = peak(lambda: torch.autograd.grad(out, inputs.leaves, grad))
    assert backward < 0.3 + (image_channels is None)
