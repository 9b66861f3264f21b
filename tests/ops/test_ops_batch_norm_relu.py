"""Batch normalisation with ReLU: against float64 arithmetic, in every type, size and layout."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_cases import CHANNELS_LAST, DEVICES, LAYOUTS, as_array, laid_out, moved
from op_oracle import Array
from torch import Tensor

from sanctl_ops import batch_norm_relu, batch_norm_relu_with_skip
from sanctl_ops.window import plane_format

EPS = 1e-5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of a result, and what sums and products in float32 are off by.
ROUNDING = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
BATCH_MEAN, BATCH_STD = 0.3, 2.0

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

CHANNELS_LAST_SHAPES = {
    "several_blocks": (3, 24, 37, 41),
    "slabs": (2, 320, 5, 6),
    "any_channels": (2, 12, 5, 6),
}
SHAPES = {
    "vectors": (3, 4, 6, 8),
    "odd_planes": (3, 4, 5, 7),
    "several_blocks_for_a_channel": (3, 2, 64, 96),
    "several_blocks_of_odd_planes": (3, 2, 61, 67),
    "many_channels": (2, 800, 3, 4),
    "many_channels_of_single_pixels": (5, 800, 1, 1),
    "one_image": (1, 3, 6, 8),
    "one_channel": (4, 1, 6, 6),
    "one_value": (1, 3, 1, 1),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dataclass(frozen=True)
class Oracle:
    """The definition and its chain rule in float64; arrays per channel are (C, 1, 1)."""

    x: Array
    weight: Array
    bias: Array

    @property
    def mean(self) -> Array:
        return self.x.mean((0, 2, 3))[:, None, None]

    @property
    def variance(self) -> Array:
        return np.square(self.x - self.mean).mean((0, 2, 3))[:, None, None]

    @property
    def deviation(self) -> Array:
        return 1 / np.sqrt(self.variance + EPS)

    @property
    def before_relu(self) -> Array:
        normalised = (self.x - self.mean) * self.deviation
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]

    def gradients(self, grad: Array) -> tuple[Array, Array, Array]:
        """Go back through the shift, the scale, the variance and the mean, one after another."""
        slope = np.where(self.before_relu > 0, grad, 0)
        centred, count = self.x - self.mean, self.x.size / self.x.shape[1]
        scaled = slope * self.weight[:, None, None]
        to_variance = (scaled * centred).sum((0, 2, 3))[:, None, None] * -0.5 * self.deviation**3
        direct = scaled * self.deviation + to_variance * 2 * centred / count
        grad_x = direct - direct.sum((0, 2, 3))[:, None, None] / count
        grad_weight = (slope * centred * self.deviation).sum((0, 2, 3))
        return grad_x, grad_weight, slope.sum((0, 2, 3))


def drawn(
    shape: tuple[int, ...],
    device: str,
    dtype: torch.dtype = torch.float64,
    mean: float = BATCH_MEAN,
    std: float = BATCH_STD,
    layout: str = "contiguous",
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x, weight (some of them negative) and bias, as leaves that require gradients."""
    torch.manual_seed(0)
    x = moved(laid_out(shape, layout), "cpu", torch.float64).mul_(std).add_(mean)
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64).unbind()
    weight_dtype = weight_dtype or torch.promote_types(dtype, torch.float32)
    weight, bias = (t.to(device, weight_dtype).requires_grad_() for t in (weight, bias))
    return moved(x, device, dtype).requires_grad_(), weight, bias


def assert_agrees(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Hold values, statistics and gradients against the oracle."""
    oracle = Oracle(as_array(x), as_array(weight), as_array(bias))
    kept = torch.promote_types(x.dtype, torch.float32)
    # The mean is rounded to its type, in float64 also while it is summed up; the deviation blows
    # that up.
    conditioning = np.abs(oracle.mean * oracle.deviation).max()
    base, roundings = (1e-12, 50) if kept == torch.float64 else (4e-6, 2)
    exact = base + roundings * torch.finfo(kept).eps * conditioning
    scale = np.abs(oracle.deviation[:, 0, 0] * oracle.weight).max()

    out, mean, variance = batch_norm_relu(x, weight, bias, EPS)
    assert (out.dtype, mean.dtype, variance.dtype) == (x.dtype, kept, kept)
    assert out.is_contiguous(memory_format=plane_format(x))
    assert_close(out, np.maximum(oracle.before_relu, 0), x.dtype, exact)
    assert_close(mean, oracle.mean[:, 0, 0], kept, exact)
    assert_close(variance, oracle.variance[:, 0, 0], kept, 1e-12)

    grad = torch.randn(out.shape, dtype=torch.float64).to(x.device, x.dtype)
    # On which side of zero rounding puts an output must not matter.
    far = np.abs(oracle.before_relu) > 2 * exact
    assert far.mean() > 0.5
    grad *= torch.from_numpy(far).to(grad.device)
    gradients = torch.autograd.grad(out, (x, weight, bias), grad)
    assert [g.dtype for g in gradients] == [x.dtype, weight.dtype, bias.dtype]
    assert gradients[0].is_contiguous(memory_format=plane_format(x))
    expected = oracle.gradients(as_array(grad))
    terms = x.numel() / x.shape[1]
    assert_close(gradients[0], expected[0], x.dtype, exact * max(scale, 1))
    for actual, wanted in zip(gradients[1:], expected[1:], strict=True):
        assert_close(actual, wanted, actual.dtype, exact * (1 + terms / 10))

    # What skips the rest adds its gradient to that of x, which may have been rounded before.
    out_again, skip, *statistics = batch_norm_relu_with_skip(x, weight, bias, EPS)
    assert all(map(torch.equal, (out_again, skip, *statistics), (out, x, mean, variance)))
    more = torch.randn(out.shape, dtype=torch.float64).to(x.device, x.dtype)
    both = torch.autograd.grad((out_again, skip), (x, weight, bias), (grad, more))
    assert both[0].dtype == x.dtype
    rounded = exact * max(scale, 1) + ROUNDING[x.dtype] * np.abs(expected[0]).max()
    assert_close(both[0], expected[0] + as_array(more), x.dtype, rounded)
    assert all(map(torch.equal, both[1:], gradients[1:]))


def assert_close(actual: Tensor, expected: Array, dtype: torch.dtype, atol: float) -> None:
    np.testing.assert_allclose(as_array(actual), expected, rtol=ROUNDING[dtype], atol=atol)


@each_shape
@each_device
def test_agrees_with_the_definition(shape: tuple[int, ...], device: str) -> None:
    assert_agrees(*drawn(shape, device))


@each_dtype
@pytest.mark.parametrize("shape", [SHAPES["several_blocks_for_a_channel"], SHAPES["odd_planes"]])
@each_device
def test_every_dtype(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    assert_agrees(*drawn(shape, device, dtype))


@each_dtype
@pytest.mark.parametrize("mean", [BATCH_MEAN, -100.0])
@pytest.mark.parametrize("shape", CHANNELS_LAST_SHAPES.values(), ids=CHANNELS_LAST_SHAPES)
@each_device
def test_channels_last(
    dtype: torch.dtype, mean: float, shape: tuple[int, ...], device: str
) -> None:
    assert_agrees(*drawn(shape, device, dtype, mean, layout="channels_last"))


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_dtype
@each_device
def test_weights_of_another_dtype(
    weight_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    assert_agrees(*drawn(SHAPES["vectors"], device, dtype, weight_dtype=weight_dtype))


@each_dtype
@pytest.mark.parametrize(
    ("mean", "std"), [(100.0, 1.0), (-100.0, 1.0), (100.0, 1e-3), (3.0, 0.0)], ids=str
)
@pytest.mark.parametrize("shape", [SHAPES["several_blocks_for_a_channel"], SHAPES["odd_planes"]])
@each_device
def test_far_from_zero_and_nearly_constant(
    dtype: torch.dtype, mean: float, std: float, shape: tuple[int, ...], device: str
) -> None:
    assert_agrees(*drawn(shape, device, dtype, mean, std))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_device
def test_every_layout(layout: str, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = drawn((2, 8, 6, 5), device, dtype, layout=layout)
    assert x.is_contiguous() == (layout == "contiguous")
    assert_agrees(x, weight, bias)
    out, *_ = batch_norm_relu(x, weight, bias)
    grad = laid_out(out.shape, layout).to(device, dtype)
    expected = torch.autograd.grad(out, (x, weight, bias), grad.contiguous(), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out, (x, weight, bias), grad), expected, strict=True):
        assert a.equal(b)


@each_device
def test_vectors_need_an_aligned_start(device: str) -> None:
    x, weight, bias = drawn(SHAPES["vectors"], device, torch.float32)
    storage = torch.zeros(x.numel() + 1, device=device)
    shifted = storage[1:].view_as(x).copy_(x.detach()).requires_grad_()
    assert_agrees(shifted, weight, bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_device
def test_what_is_not_finite_shows_in_its_channel_only(value: float, device: str) -> None:
    x, weight, bias = drawn(SHAPES["vectors"], device, torch.float32)
    with torch.no_grad():
        x[1, 2, 3, 4] = value
    out, mean, variance = batch_norm_relu(x, weight, bias)
    finite = torch.tensor([True, True, False, True], device=device)
    assert out.isfinite().all((0, 2, 3)).equal(finite)
    assert out[:, 2].isnan().all()
    assert mean.isfinite().equal(finite)
    assert variance.isfinite().equal(finite)
    grad_x, *_ = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    assert grad_x[:, 2].isnan().all()
    assert grad_x.isfinite().all((0, 2, 3)).equal(finite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_device
def test_two_runs_are_bit_identical(dtype: torch.dtype, device: str) -> None:
    def run() -> list[Tensor]:
        leaves = drawn((8, 3, 64, 64), device, dtype)
        out, mean, variance = batch_norm_relu(*leaves)
        return [out, mean, variance, *torch.autograd.grad(out, leaves, torch.sin(out.detach()))]

    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_gradcheck() -> None:
    leaves = drawn((2, 3, 4, 5), "cpu")
    oracle = Oracle(*map(as_array, leaves))
    assert np.abs(oracle.before_relu).min() > 1e-3, "a kink of ReLU is too near"
    assert torch.autograd.gradcheck(lambda *t: batch_norm_relu(*t)[0], leaves)
    last = drawn((2, 3, 4, 5), "cpu", layout="channels_last")
    assert np.abs(Oracle(*map(as_array, last)).before_relu).min() > 1e-3
    assert torch.autograd.gradcheck(lambda *t: batch_norm_relu_with_skip(*t)[:2], last)


def test_statistics_have_no_gradient() -> None:
    out, mean, variance = batch_norm_relu(*drawn(SHAPES["vectors"], "cpu"))
    assert (out.requires_grad, mean.requires_grad, variance.requires_grad) == (True, False, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_device
def test_opcheck(layout: str, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = drawn((2, 8, 6, 5), device, dtype, layout=layout)
    torch.library.opcheck(torch.ops.sanctl.batch_norm_relu, (x, weight, bias, EPS))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    out, mean, _, deviation = torch.ops.sanctl.batch_norm_relu(x, weight, bias, EPS)
    grad = laid_out(out.shape, layout).to(device, dtype)
    torch.library.opcheck(
        torch.ops.sanctl.batch_norm_relu_backward,
        (grad, x, out, weight, bias, mean, deviation),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", CHANNELS_LAST)
@each_device
def test_opcheck_of_channels_last(layout: str, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = drawn((2, 8, 6, 5), device, dtype, layout=layout)
    forward = torch.ops.sanctl.batch_norm_relu_channels_last
    torch.library.opcheck(forward, (x, weight, bias, EPS))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    out, *saved = forward(x, weight, bias, EPS)
    for skip in (None, x):
        torch.library.opcheck(
            torch.ops.sanctl.batch_norm_relu_channels_last_backward,
            (out, x, weight, bias, *saved, EPS, skip),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
@each_device
def test_compiles_without_a_graph_break(backend: str, dynamic: bool, device: str) -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, mean, variance = batch_norm_relu(2 * x, weight, bias)
        out, skip, *_ = batch_norm_relu_with_skip(out.sin(), weight, bias)
        return out + skip.cos() + (mean + variance)[:, None, None]

    leaves = drawn((2, 4, 6, 7), device, layout="channels_last")
    out = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)(*leaves)
    expected = layer(*leaves)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x must be \(N, C, H, W\), got 2-d \(3, 4\)"),
        ({"x": torch.zeros(0, 4, 2, 2)}, r"x \(0, 4, 2, 2\) has no values"),
        ({"x": torch.zeros(1, 4, 2, 2, dtype=torch.int64)}, "int64"),
        ({"weight": torch.zeros(3)}, r"weight must be \(C,\) = \(4,\) .* got \(3,\)"),
        ({"bias": torch.zeros(4, 1)}, r"bias must be \(C,\) = \(4,\) .* got \(4, 1\)"),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, r"bias \(4,\) is int32"),
        ({"weight": torch.zeros(4, device="meta")}, "different devices: cpu and meta"),
    ],
    ids=str,
)
def test_unusable_arguments(changed: dict[str, Tensor], message: str) -> None:
    usable = {"x": torch.zeros(1, 4, 2, 2), "weight": torch.ones(4), "bias": torch.zeros(4)}
    arguments = usable | changed
    for operator in (batch_norm_relu, batch_norm_relu_with_skip):
        with pytest.raises(ValueError, match=message):
            operator(arguments["x"], arguments["weight"], arguments["bias"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_size_of_a_training_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16, 49, 3136, device="cuda").to(dtype).requires_grad_()
    weight = torch.linspace(-2, 2, 16, device="cuda").requires_grad_()
    bias = torch.linspace(1, 2, 16, device="cuda").requires_grad_()
    out, mean, variance = batch_norm_relu(x, weight, bias)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight, bias)]
    expected = F.batch_norm(wide[0], None, None, wide[1], wide[2], True)
    grad = torch.randn_like(out) * (expected.detach().abs() > 1e-4)
    expected = expected.relu()
    rtol = ROUNDING[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(mean.double(), wide[0].mean((0, 2, 3)), rtol=0, atol=1e-7)
    expected_variance = wide[0].var((0, 2, 3), correction=0)
    # A thread adds up some 300 squares in float32 before they meet in float64.
    torch.testing.assert_close(variance.double(), expected_variance, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(out, (x, weight, bias), grad)
    expected_gradients = torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(gradients[0].double(), expected_gradients[0], rtol=rtol, atol=1e-5)
    for actual, wanted in zip(gradients[1:], expected_gradients[1:], strict=True):
        # Sums of 10 million terms of either sign, some 3000 in size.
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-1)
