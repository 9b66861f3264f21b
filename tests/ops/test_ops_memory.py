"""What the operators allocate at their peak, measured by torch's allocators."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICES
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sanctl_ops import aggregation, concatenation, subtraction2

BATCH, CHANNELS, SHARED, SIDE, KERNEL = 2, 64, 8, 24, 7
PLANES = BATCH * CHANNELS * SIDE * SIDE
WEIGHTS = BATCH * SHARED * KERNEL**2 * SIDE * SIDE
VALUE_COPY = PLANES * KERNEL**2

each_device = pytest.mark.parametrize("device", DEVICES)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Return the most memory in bytes that `run` held at one time, what it returns included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def by_unfold(x: Tensor, w: Tensor) -> Tensor:
    padded = F.pad(x, [KERNEL // 2] * 4, mode="reflect")
    taps = F.unfold(padded, KERNEL).unflatten(1, (CHANNELS // SHARED, SHARED, KERNEL**2))
    return (taps * w[:, None]).sum(3).view_as(x)


def by_operator(x: Tensor, w: Tensor) -> Tensor:
    return aggregation(x, w, KERNEL, padding=KERNEL // 2)


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, dtype=dtype, device=device)
    w = torch.randn(BATCH, SHARED, KERNEL**2, SIDE * SIDE, dtype=dtype, device=device)
    return x.requires_grad_(), w.requires_grad_()


@each_device
def test_the_measurement_sees_the_copy_of_unfold(device: str) -> None:
    x, w = inputs(device, torch.float32)
    with torch.no_grad():
        assert peak_bytes(lambda: by_unfold(x, w), device) >= VALUE_COPY * x.itemsize


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aggregation_forward_holds_a_few_planes(device: str, dtype: torch.dtype) -> None:
    x, w = inputs(device, dtype)
    with torch.no_grad():
        peak = peak_bytes(lambda: by_operator(x, w), device)
    # The padded plane, the accumulator, the result, and what converting 16-bit inputs takes.
    assert peak < 8 * PLANES * x.itemsize


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aggregation_backward_holds_its_gradients_and_a_few_planes(
    device: str, dtype: torch.dtype
) -> None:
    x, w = inputs(device, dtype)

    def backward_peak(formula: Callable[[Tensor, Tensor], Tensor]) -> int:
        out = formula(x, w)
        grad = torch.ones_like(out)
        return peak_bytes(lambda: torch.autograd.grad(out, (x, w), grad), device)

    peak = backward_peak(by_operator)
    # A 16-bit gradient of the weights exists in float32, too, while it is summed up.
    copies_of_weights = 1 if dtype == torch.float32 else 3
    assert peak < (copies_of_weights * WEIGHTS + 8 * PLANES) * x.itemsize
    assert peak < backward_peak(by_unfold) / 4


@each_device
@pytest.mark.parametrize(
    ("relation", "scratch"), [(subtraction2, 0), (concatenation, KERNEL)], ids=["sub", "cat"]
)
def test_a_relation_holds_its_result_and_a_few_planes(
    relation: Callable[..., Tensor], scratch: int, device: str
) -> None:
    x1, x2 = (inputs(device, torch.float32)[0] for _ in range(2))
    out = relation(x1, x2, KERNEL, padding=KERNEL // 2)
    grad = torch.randn_like(out)

    def forward() -> Tensor:
        return relation(x1, x2, KERNEL, padding=KERNEL // 2)

    def backward() -> object:
        return torch.autograd.grad(out, (x1, x2), grad)

    with torch.no_grad():
        assert peak_bytes(forward, device) < (VALUE_COPY + 6 * PLANES) * x1.itemsize
    # The formula of concatenation adds up columns first, which makes K padded planes.
    assert peak_bytes(backward, device) < (8 + 1.5 * scratch) * PLANES * x1.itemsize
