"""The arithmetic of the kernels where there is no GPU: their sources on threads of a CPU."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from kernels_on_cpu import Launcher
from op_cases import OPERATORS, Case, laid_out
from pooling_cases import PoolingCase, assert_same_nans, decided
from pooling_cases import composed as pooled_by_torch
from pooling_cases import differentiated as pooled_gradients
from pooling_cases import draw as draw_pooled
from pooling_cases import fused as pooled
from pooling_cases import truth as pooled_truth

from sanctl_ops import batch_norm_relu, batch_norm_relu_with_skip

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# Roundings of the result; sums are the same but for their order.
TOLERANCES = {
    torch.float32: (1e-5, 2e-5),
    torch.bfloat16: (2**-7, 1e-5),
    torch.float16: (2**-10, 1e-5),
}

CASES = [
    ("subtraction2", torch.float32, Case("vectors of 4", 9, 28, 7, padding=3, channels=2)),
    ("subtraction2", torch.float32, Case("vectors of 2", 14, 6, 3, padding=1, pad_mode="zero")),
    ("subtraction2", torch.bfloat16, Case("any windows", 7, 9, 3, 2, 1, channels=2)),
    ("concatenation", torch.float32, Case("vectors of 2", 5, 14, 5, padding=2, channels=2)),
    ("concatenation", torch.float32, Case("any windows", 6, 7, 2, padding=1, channels=2)),
    ("aggregation", torch.float32, Case("vectors of 4", 9, 28, 7, padding=3, channels=16)),
    ("aggregation", torch.float32, Case("single", 6, 7, 7, padding=3, channels=6)),
    ("aggregation", torch.float32, Case("any", 7, 9, 3, 2, 1, channels=4, pad_mode="zero")),
    ("aggregation", torch.bfloat16, Case("long rows", 4, 72, 7, padding=3, channels=16)),
    ("aggregation", torch.bfloat16, Case("tiles", 19, 40, 7, padding=3, channels=2)),
    ("aggregation", torch.bfloat16, Case("rows", 17, 28, 7, padding=3, channels=16, shared=2)),
    ("aggregation", torch.bfloat16, Case("short rows", 14, 14, 7, padding=3, channels=6)),
    ("aggregation", torch.float16, Case("zeros", 5, 16, 5, padding=2, pad_mode="zero")),
    ("aggregation", torch.bfloat16, Case("vectors, zeros", 14, 14, 3, padding=1, pad_mode="zero")),
    ("aggregation", torch.bfloat16, Case("strided", 6, 8, 3, padding=1, layout="channels_last")),
]


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize(
    ("name", "dtype", "case"), CASES, ids=[f"{n}-{d}-{c.name}" for n, d, c in CASES]
)
def test_kernels_compute_what_the_formulas_do(
    name: str,
    dtype: torch.dtype,
    case: Case,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = OPERATORS[name]
    shapes = operator.input_shapes(case)
    inputs = [laid_out(shape, case.layout).to(dtype).requires_grad_() for shape in shapes]
    launched = len(launcher.launched)
    out = operator.run(*inputs, case.geometry)
    grad = torch.randn(out.shape).to(dtype)
    actual = [out, *torch.autograd.grad(out, inputs, grad)]
    assert len(launcher.launched) > launched + 1
    wide = [x.detach().double().requires_grad_() for x in inputs]
    monkeypatch.undo()
    expected_out = operator.run(*wide, case.geometry)
    expected = [expected_out, *torch.autograd.grad(expected_out, wide, grad.double())]
    rtol, atol = TOLERANCES[dtype]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


POOLING_CASES = [
    (torch.bfloat16, PoolingCase("odd", 7, 9, channels=24)),
    (torch.float16, PoolingCase("running", 4, 6, channels=16, running=True)),
    (torch.float32, PoolingCase("slabs of several parts", 33, 18, channels=256, batch=3)),
    (torch.float32, PoolingCase("far from zero", 12, 13, offset=200.0)),
    (torch.bfloat16, PoolingCase("colour", 37, 21, channels=64, image_channels=3)),
    (torch.float16, PoolingCase("grey", 6, 5, channels=24, image_channels=1, running=True)),
    (torch.float32, PoolingCase("colour, far", 21, 22, image_channels=3, offset=200.0)),
    (torch.float32, PoolingCase("four, one window", 3, 3, 8, image_channels=4, batch=1)),
]
each_pooling_case = pytest.mark.parametrize(
    ("dtype", "case"), POOLING_CASES, ids=[f"{d}-{c.name}" for d, c in POOLING_CASES]
)


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("levels", [None, 1.0], ids=["", "equal values"])
@each_pooling_case
def test_kernels_that_normalise_and_pool(
    dtype: torch.dtype, case: PoolingCase, levels: float | None, launcher: Launcher
) -> None:
    inputs = draw_pooled(case).to("cpu", dtype, torch.float32)
    if levels is not None:
        with torch.no_grad():
            inputs.x.sub_(case.offset).round_().clamp_(-levels, levels).add_(case.offset)
    exact = pooled_truth(inputs, dtype)
    margin = 1e-3 if case.offset > 100 else 2e-5
    clear = decided(exact, margin)
    grad = (torch.randn_like(clear) * clear).to(dtype)
    launched = len(launcher.launched)
    actual = pooled_gradients(lambda x: pooled(x)[0], inputs, grad)
    names = {kernel.expression.partition("<")[0] for kernel in launcher.launched[launched:]}
    assert len(names) == (5 if case.running is False else 4) + (case.image_channels is None)
    expected = pooled_gradients(pooled_by_torch, exact, grad)
    rtol, atol = TOLERANCES[dtype]
    for name, wanted in expected.items():
        most = wanted.abs().max().item()
        loose = 50 if case.offset > 100 else 1
        torch.testing.assert_close(
            actual[name].double(), wanted, rtol=rtol, atol=atol * loose * max(1, most)
        )


NORMALISED = [
    (torch.bfloat16, (2, 24, 7, 9), 0.3),
    (torch.float16, (3, 8, 2, 3), 0.3),
    (torch.float32, (3, 256, 33, 18), 0.3),
    (torch.float32, (2, 16, 12, 13), 200.0),
]


OF_LAYOUTS = {
    "contiguous": {
        *("moments", "join_moments", "normalise"),
        *("slope_sums", "join_sums", "input_gradient"),
    },
    "channels_last": {
        *("norm_moments", "norm_fold", "norm_relu"),
        *("norm_relu_sums", "norm_close", "norm_relu_input_gradient"),
    },
}


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("layout", OF_LAYOUTS)
@pytest.mark.parametrize(("dtype", "shape", "offset"), NORMALISED, ids=str)
def test_kernels_that_normalise(
    dtype: torch.dtype, shape: tuple[int, ...], offset: float, layout: str, launcher: Launcher
) -> None:
    torch.manual_seed(0)
    x = (laid_out(shape, layout) + offset).to(dtype).requires_grad_()
    weight, bias = torch.randn(2, shape[1]).unbind()
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    before = F.batch_norm(wide[0], None, None, wide[1], wide[2], True)
    grad = (torch.randn(shape) * (before.abs() > 1e-3)).to(dtype)
    launched = len(launcher.launched)
    out, mean, variance = batch_norm_relu(*leaves)
    found = (out, mean, variance, *torch.autograd.grad(out, leaves, grad))
    names = {kernel.expression.partition("<")[0] for kernel in launcher.launched[launched:]}
    assert names == OF_LAYOUTS[layout]
    expected = before.relu()
    gradients = torch.autograd.grad(expected, wide, grad.double())
    moments = wide[0].mean((0, 2, 3)), wide[0].var((0, 2, 3), correction=0)
    rtol, atol = TOLERANCES[dtype]
    for actual, wanted in zip(found, (expected, *moments, *gradients), strict=True):
        allowed = atol * max(1, offset) * max(1, wanted.abs().max().item())
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=allowed)
    out, skip, *_ = batch_norm_relu_with_skip(*leaves)
    more = torch.randn(shape).to(dtype)
    (both,) = torch.autograd.grad((out, skip), x, (grad, more))
    # Of contiguous tensors, autograd adds what has been rounded.
    wanted = (gradients[0] if layout == "channels_last" else found[3].double()) + more.double()
    allowed = atol * max(1, offset) * max(1, wanted.abs().max().item())
    torch.testing.assert_close(both.double(), wanted, rtol=rtol, atol=allowed)


@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.parametrize("image_channels", [None, 2])
@pytest.mark.parametrize("running", [False, True])
def test_kernels_keep_a_nan(image_channels: int | None, running: bool) -> None:
    case = PoolingCase("", 6, 7, image_channels=image_channels, running=running)
    inputs = draw_pooled(case).to("cpu", torch.float32, torch.float32)
    with torch.no_grad():
        inputs.x[1, 1, 2, 3] = torch.nan
        inputs.x[1, 1, 3, 2] = torch.nan
    grad = torch.ones(2, 8, 3, 3)
    actual = pooled_gradients(lambda x: pooled(x)[0], inputs, grad)
    expected = pooled_gradients(pooled_by_torch, pooled_truth(inputs, torch.float32), grad)
    assert_same_nans(inputs, actual, expected)
