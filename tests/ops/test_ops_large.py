"""The operators at sizes that take the fast CUDA kernels, against the formulas in float64."""

import pytest
import torch
from torch import Tensor

import sanctl_ops
from sanctl_ops import aggregation, subtraction2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# What rounding the result leaves, and sums of up to 49 * 8 terms in float32.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 2e-5),
    torch.float16: (2**-11, 2e-5),
    torch.bfloat16: (2**-8, 2e-5),
}
SIDES = [(7, 7), (14, 14), (28, 28), (9, 30), (56, 56), (5, 62), (6, 64), (11, 101), (13, 128)]
each_side = pytest.mark.parametrize("sides", SIDES, ids=lambda sides: f"{sides[0]}x{sides[1]}")
each_kernel = pytest.mark.parametrize("kernel_size", [3, 5, 7])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
each_mode = pytest.mark.parametrize("pad_mode", ["reflect", "zero"])


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device="cuda").to(dtype)


def poison(*tensors: Tensor) -> None:
    """Leave NaN where the allocator will put results of these sizes, should any stay unwritten."""
    for tensor in tensors:
        torch.full_like(tensor, torch.nan)


def by_formula(run: object, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return what the torch formulas give in float64: the output, then the gradients."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with sanctl_ops.use_backend("torch"):
        out = run(*wide)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, wide, grad.double())]


def check(run: object, inputs: list[Tensor]) -> None:
    inputs = [x.requires_grad_() for x in inputs]
    out = run(*inputs)  # type: ignore[operator]
    grad = torch.randn_like(out)
    expected = by_formula(run, inputs, grad)
    poison(out, *inputs)
    out = run(*inputs)  # type: ignore[operator]
    poison(out, *inputs)
    gradients = torch.autograd.grad(out, inputs, grad)
    rtol, atol = TOLERANCES[out.dtype]
    for actual, wanted in zip([out, *gradients], expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=atol)


@each_mode
@each_dtype
@each_kernel
@each_side
def test_aggregation(
    sides: tuple[int, int], kernel_size: int, dtype: torch.dtype, pad_mode: str
) -> None:
    x = random(2, 24, *sides, dtype=dtype)
    w = random(2, 3, kernel_size**2, sides[0] * sides[1], dtype=dtype)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return aggregation(x, w, kernel_size, padding=kernel_size // 2, pad_mode=pad_mode)

    check(run, [x, w])


@each_dtype
@pytest.mark.parametrize("shared", [1, 2, 4, 12])
def test_any_number_of_channels_may_share_a_weight(shared: int, dtype: torch.dtype) -> None:
    x = random(2, 12, 10, 24, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = random(2, shared, 49, 240, dtype=dtype)
    check(lambda x, w: aggregation(x, w, 7, padding=3), [x, w])


@each_mode
@each_dtype
@each_kernel
@each_side
def test_subtraction2(
    sides: tuple[int, int], kernel_size: int, dtype: torch.dtype, pad_mode: str
) -> None:
    x1, x2 = (random(2, 3, *sides, dtype=dtype) for _ in range(2))

    def run(x1: Tensor, x2: Tensor) -> Tensor:
        return subtraction2(x1, x2, kernel_size, padding=kernel_size // 2, pad_mode=pad_mode)

    check(run, [x1, x2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_that_is_not_the_current_one(dtype: torch.dtype) -> None:
    x, w = random(2, 24, 14, 14, dtype=dtype), random(2, 3, 49, 196, dtype=dtype)
    weight, bias = torch.randn(2, 24, device="cuda")

    def results(device: str) -> list[Tensor]:
        inputs = [value.to(device).requires_grad_() for value in (x, w)]
        relation = subtraction2(inputs[0], inputs[0], 7, padding=3)
        out = aggregation(inputs[0], inputs[1], 7, padding=3)
        joined = sanctl_ops.concatenation(inputs[0], inputs[0], 3, padding=1)
        normal, *_ = sanctl_ops.batch_norm_relu(out, weight.to(device), bias.to(device))
        sums = [value.float().square().sum() for value in (relation, joined, normal)]
        gradients = torch.autograd.grad(torch.stack(sums).sum(), inputs)
        return [relation, joined, normal, *gradients]

    assert torch.cuda.current_device() == 0
    for one, other in zip(results("cuda:0"), results("cuda:1"), strict=True):
        assert other.device == torch.device("cuda:1")
        assert torch.equal(one.cpu(), other.cpu())
