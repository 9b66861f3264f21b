"""norm_pool and conv_norm_pool: beside torch's own operators in float64, and as torch sees them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DEVICES, LAYOUTS
from pooling_cases import (
    Inputs,
    PoolingCase,
    assert_same_nans,
    composed,
    decided,
    differentiated,
    draw,
    fused,
    statistics,
    truth,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sanctl_ops import (
    Norm,
    conv_norm_pool,
    conv_norm_pool_obstacle,
    norm_pool,
    norm_pool_obstacle,
)
from sanctl_ops.kernels import channels
from sanctl_ops.kernels import conv_norm_pool as conv_kernels

OPERATORS = (None, 3)
each_operator = pytest.mark.parametrize("image_channels", OPERATORS, ids=["norm", "conv"])
each_device = pytest.mark.parametrize("device", DEVICES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_mode = pytest.mark.parametrize("running", [False, True], ids=["training", "running"])
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


def output(inputs: Inputs) -> Tensor:
    return fused(inputs)[0]


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


@each_layout
@each_operator
@each_device
def test_output_and_gradient_are_channels_last(
    image_channels: int | None, layout: str, device: str
) -> None:
    case = PoolingCase("", 5, 6, image_channels=image_channels, layout=layout)
    inputs = draw(case).to(device, torch.bfloat16, torch.float32)
    out = output(inputs)
    assert out.is_contiguous(memory_format=torch.channels_last)
    first, *_ = torch.autograd.grad(out.sum(), inputs.leaves)
    if image_channels is None:
        assert first.is_contiguous(memory_format=torch.channels_last)


@each_operator
@each_device
def test_two_runs_are_bit_identical(image_channels: int | None, device: str) -> None:
    case = PoolingCase("", 65, 64, channels=24, image_channels=image_channels, batch=5)
    inputs = draw(case).to(device, torch.bfloat16, torch.float32)
    grad = torch.sin(output(inputs).detach())
    first, second = (differentiated(output, inputs, grad) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@each_operator
@each_mode
def test_gradcheck(image_channels: int | None, running: bool) -> None:
    inputs = draw(PoolingCase("", 5, 4, channels=3, image_channels=image_channels, running=running))
    assert decided(inputs, 1e-4).all(), "a kink is too near"

    def run(first: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norm = inputs.norm._replace(weight=weight, bias=bias)
        if inputs.weight is None:
            return norm_pool(first, norm)[0]
        return conv_norm_pool(inputs.x, first, norm)[0]

    assert torch.autograd.gradcheck(run, inputs.leaves)


@each_layout
@each_mode
@each_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_device
def test_opcheck(
    dtype: torch.dtype, image_channels: int | None, running: bool, layout: str, device: str
) -> None:
    parameters = torch.promote_types(dtype, torch.float32)
    case = PoolingCase("", 5, 6, image_channels=image_channels, running=running, layout=layout)
    inputs = draw(case).to(device, dtype, parameters)
    given = (inputs.x,) if inputs.weight is None else (inputs.x, inputs.weight)
    name = "norm_pool" if inputs.weight is None else "conv_norm_pool"
    forward = getattr(torch.ops.sanctl, name)
    torch.library.opcheck(forward, (*given, *inputs.norm))
    out, mean, variance, *saved = forward(*given, *inputs.norm)
    known = [t.detach() for t in (*given, *inputs.norm[:2], mean, variance)]
    flags = () if inputs.weight is not None else (not running,)
    torch.library.opcheck(
        getattr(torch.ops.sanctl, f"{name}_backward"),
        (out.detach(), *known, inputs.norm.eps, *saved, *flags),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
@each_operator
@each_device
def test_compiles_without_a_graph_break(
    image_channels: int | None, backend: str, dynamic: bool, device: str
) -> None:
    inputs = draw(PoolingCase("", 6, 7, image_channels=image_channels)).to(
        device, torch.float64, torch.float64
    )

    def layer(x: Tensor) -> Tensor:
        out, mean, variance = fused(replace(inputs, x=2 * x))
        return out.sin() + (mean + variance)[:, None, None]

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    out, wanted = compiled(inputs.x), layer(inputs.x)
    torch.testing.assert_close(out, wanted)
    assert out.stride() == wanted.stride()
    grad = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs.leaves, grad),
        torch.autograd.grad(wanted, inputs.leaves, grad),
    )


@pytest.mark.usefixtures("fresh_compiler")
@each_operator
@each_device
def test_only_the_first_other_batch_compiles_anew(image_channels: int | None, device: str) -> None:
    compiled = []

    def count(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    def layer(inputs: Inputs) -> Tensor:
        obstacle = (
            norm_pool_obstacle(inputs.x)
            if inputs.weight is None
            else conv_norm_pool_obstacle(inputs.x, inputs.weight.shape[0])
        )
        return output(inputs) * (1 if obstacle is None else 2)

    run = torch.compile(layer, fullgraph=True, backend=count)
    for batch in (2, 3, 5, 7):
        case = PoolingCase("", 6, 6, image_channels=image_channels, batch=batch)
        run(draw(case).to(device, torch.bfloat16, torch.float32))
    assert len(compiled) == 2


def test_flops() -> None:
    inputs = draw(PoolingCase("", 5, 6, channels=16, image_channels=3))
    with FlopCounterMode(display=False) as counter:
        output(inputs).sum().backward()
    with FlopCounterMode(display=False) as expected:
        composed(inputs).sum().backward()
    assert counter.get_total_flops() == expected.get_total_flops()


NORM = Norm(torch.ones(8), torch.zeros(8), None, None, 1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.zeros(3, 4)}, r"images must be \(N, C, H, W\), got 2-d \(3, 4\)"),
        ({"images": torch.zeros(0, 3, 4, 4)}, r"images \(0, 3, 4, 4\) has no 2 x 2 values"),
        ({"images": torch.zeros(2, 3, 1, 4)}, r"images \(2, 3, 1, 4\) has no 2 x 2 values"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "int64"),
        ({"images": torch.zeros(2, 3, 4, 4, requires_grad=True)}, "require a gradient"),
        ({"weight": torch.zeros(8, 4)}, r"weight must be \(Cout, Cin\) .* got \(8, 4\)"),
        ({"weight": torch.zeros(8, 3, 1, 1)}, r"weight must be \(Cout, Cin\)"),
        ({"weight": torch.zeros(8, 3, device="meta")}, "different devices: cpu and meta"),
        ({"norm": NORM._replace(bias=torch.zeros(7))}, r"norm.bias must be \(8,\), got \(7,\)"),
        ({"norm": NORM._replace(mean=torch.zeros(8))}, "not both"),
    ],
    ids=str,
)
def test_unusable_arguments(changed: dict[str, Any], message: str) -> None:
    usable: dict[str, Any] = {
        "images": torch.zeros(2, 3, 4, 4),
        "weight": torch.zeros(8, 3),
        "norm": NORM,
    }
    with pytest.raises(ValueError, match=message):
        conv_norm_pool(**(usable | changed))
    if "images" in changed and not changed["images"].requires_grad:
        with pytest.raises(ValueError, match=message.replace("images", "x")):
            norm_pool(changed["images"], NORM)


def test_a_reason_tells_why_no_kernels_run() -> None:
    x = torch.zeros(2, 8, 4, 4)
    assert "CUDA device, not cpu" in str(norm_pool_obstacle(x))
    assert "CUDA device, not cpu" in str(conv_norm_pool_obstacle(x, 64))
    assert "gradients of images" in str(conv_norm_pool_obstacle(x.requires_grad_(), 64))
    assert channels.obstacle(torch.float32, 64, "norm_pool") is None
    assert "not float64" in str(channels.obstacle(torch.float64, 64, "norm_pool"))
    assert "multiples of 8 channels, not 12" in str(conv_kernels.obstacle(torch.float16, 3, 12))
    assert conv_kernels.obstacle(torch.bfloat16, 4, 256) is None
    assert "not 264 of 3" in str(conv_kernels.obstacle(torch.bfloat16, 3, 264))
    assert "not 64 of 5" in str(conv_kernels.obstacle(torch.bfloat16, 5, 64))


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
