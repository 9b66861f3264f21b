"""Every operator against its definition, forward and backward, over the table of cases."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from op_cases import (
    CASES,
    CHANNELS_LAST,
    DEVICES,
    LAYOUTS,
    OPERATORS,
    Case,
    Operator,
    as_array,
    make_inputs,
)
from op_oracle import Array
from torch import Tensor

# Sums are kept in float64 or float32, so what a 16-bit result may be off by is its own rounding
# (half a unit in the last place) beside the rounding of float32 sums of at most 49 terms.
TOLERANCES = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-8, 1e-5),
    torch.float16: (2**-11, 1e-5),
}
LARGEST = Case("largest_sums", 8, 8, 7, padding=3, channels=16)

each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_device = pytest.mark.parametrize("device", DEVICES)


def gradients_of(out: Tensor, inputs: Sequence[Tensor], layout: str) -> tuple[Tensor, ...]:
    grad = torch.randn(out.shape, dtype=torch.float64).to(out.device, out.dtype)
    if layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    return grad, *torch.autograd.grad(out, inputs, grad)


def assert_close(actual: Tensor, expected: Array) -> None:
    rtol, atol = TOLERANCES[actual.dtype]
    np.testing.assert_allclose(as_array(actual), expected, rtol=rtol, atol=atol)


@each_operator
@each_case
@each_device
def test_agrees_with_the_loops(operator: Operator, case: Case, device: str) -> None:
    inputs = make_inputs(operator, case, device)
    arrays = [as_array(x) for x in inputs]
    out = operator.run(*inputs, case.geometry)
    assert_close(out, operator.expected(*arrays, case.geometry))

    grad, *gradients = gradients_of(out, inputs, case.layout)
    expected = operator.gradients(*arrays, as_array(grad), case.geometry)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["subtraction2", "concatenation", "aggregation"])
@each_device
def test_every_dtype_rounds_once(name: str, dtype: torch.dtype, device: str) -> None:
    operator = OPERATORS[name]
    inputs = make_inputs(operator, LARGEST, device, dtype)
    arrays = [as_array(x) for x in inputs]
    out = operator.run(*inputs, LARGEST.geometry)
    assert out.dtype == dtype
    assert_close(out, operator.expected(*arrays, LARGEST.geometry))

    grad, *gradients = gradients_of(out, inputs, LARGEST.layout)
    expected = operator.gradients(*arrays, as_array(grad), LARGEST.geometry)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted)


@each_operator
@each_case
def test_gradcheck(operator: Operator, case: Case) -> None:
    inputs = make_inputs(operator, case, "cpu")

    def run(*tensors: Tensor) -> Tensor:
        return operator.run(*tensors, case.geometry)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@each_operator
@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bit_identical(operator: Operator, device: str, dtype: torch.dtype) -> None:
    case = Case("split_among_threads", 16, 16, 5, padding=2, channels=16)

    def run() -> list[Tensor]:
        inputs = make_inputs(operator, case, device, dtype)
        out = operator.run(*inputs, case.geometry)
        torch.manual_seed(1)
        return [out, *gradients_of(out, inputs, case.layout)]

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    # In this mode torch also refuses the backward passes that it knows to be nondeterministic.
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@each_operator
@each_device
def test_the_layout_does_not_change_the_values(operator: Operator, device: str) -> None:
    case = Case("layouts", 6, 7, 3, padding=1)
    plain = make_inputs(operator, case, device)
    expected = operator.run(*plain, case.geometry)
    for layout in LAYOUTS:
        other = make_inputs(operator, Case("x", 6, 7, 3, padding=1, layout=layout), device)
        for x, values in zip(other, plain, strict=True):
            x.detach().copy_(values.detach())
        assert torch.equal(operator.run(*other, case.geometry), expected)


@each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planes_keep_the_layout_and_windows_are_contiguous(layout: str, device: str) -> None:
    case = Case("x", 6, 7, 3, padding=1, layout=layout)
    expected = torch.channels_last if layout in CHANNELS_LAST else torch.contiguous_format
    for name, operator in OPERATORS.items():
        inputs = make_inputs(operator, case, device)
        out = operator.run(*inputs, case.geometry)
        gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
        planes = [gradients[0], out] if name == "aggregation" else [*gradients]
        windows = [gradients[1]] if name == "aggregation" else [out]
        assert all(plane.is_contiguous(memory_format=expected) for plane in planes)
        assert all(window.is_contiguous() for window in windows)


def test_the_layouts_of_the_cases_differ_in_memory() -> None:
    case = {layout: Case("x", 6, 7, 3, padding=1, layout=layout) for layout in LAYOUTS}
    strides = {
        layout: make_inputs(OPERATORS["subtraction"], case[layout], "cpu")[0].stride()
        for layout in LAYOUTS
    }
    assert len(set(strides.values())) == len(LAYOUTS)


def test_backward_of_the_backward_is_refused() -> None:
    operator = OPERATORS["aggregation"]
    x, w = make_inputs(operator, CASES[0], "cpu")
    out = operator.run(x, w, CASES[0].geometry)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward through sanctl.aggregation_backward"):
        grad.sum().backward()
