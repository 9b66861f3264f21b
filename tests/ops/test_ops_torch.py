"""The operators as torch sees them: schema, strides, torch.compile and the FLOP counter."""

from collections.abc import Iterator

import pytest
import torch
from op_cases import CASES, DEVICES, OPERATORS, Case, laid_out, make_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sanctl_ops import aggregation, subtraction, subtraction2

CHECKED = [
    case
    for case in CASES
    if case.name
    in {
        "same_3x3",
        "odd_sides_5x5_zero",
        "stride_2_dilation_2",
        "kernel_1",
        "channels_last",
        "channels_last_no_padding",
        "sliced",
    }
]

each_checked = pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Without what earlier runs compiled: the caches do not see a change in an operator."""
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["subtraction2", "aggregation"])
@each_checked
@each_device
def test_opcheck(name: str, case: Case, device: str) -> None:
    inputs = make_inputs(OPERATORS[name], case, device)
    operator = getattr(torch.ops.sanctl, name)
    torch.library.opcheck(operator, (*inputs, *case.geometry))


@each_checked
@each_device
def test_opcheck_of_the_backward(case: Case, device: str) -> None:
    x, w = make_inputs(OPERATORS["aggregation"], case, device)
    grad = laid_out(case.output_shape, case.layout).to(device)
    torch.library.opcheck(
        torch.ops.sanctl.aggregation_backward,
        (grad, x.detach(), w.detach(), *case.geometry),
        test_utils=("test_schema", "test_faketensor"),
    )
    relation_shape = (case.batch, case.channels, *case.weight_shape[2:])
    torch.library.opcheck(
        torch.ops.sanctl.subtraction2_backward,
        (
            laid_out(relation_shape, case.layout).to(device),
            *case.image_shape[2:],
            case.layout == "channels_last",
            *case.geometry,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def attend(query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
    """Chain all three operators as a self-attention layer does."""
    relation = subtraction2(query, key, 3, padding=1) + subtraction(position, 3, padding=1)
    return aggregation(value * 2, relation, 3, padding=1)


def attention_inputs(device: str) -> list[Tensor]:
    case = Case("attention", 6, 7, 3, padding=1, layout="channels_last")
    query, key = make_inputs(OPERATORS["subtraction2"], case, device)
    value = laid_out((2, 8, 6, 7), "channels_last").to(device).requires_grad_()
    position = laid_out((1, 4, 6, 7), "contiguous").to(device).requires_grad_()
    return [query, key, value, position]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
@each_device
def test_compiles_without_a_graph_break(backend: str, dynamic: bool, device: str) -> None:
    inputs = attention_inputs(device)
    compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=dynamic)
    out, expected = compiled(*inputs), attend(*inputs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_flops(name: str) -> None:
    case = Case("flops", 6, 5, 3, stride=2, padding=1)
    inputs = make_inputs(OPERATORS[name], case, "cpu")
    with FlopCounterMode(display=False) as forward:
        out = OPERATORS[name].run(*inputs, case.geometry)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    batch, channels, taps, windows = 2, 4, 9, 3 * 3
    per_term = 2 if name == "aggregation" else 1
    expected = per_term * batch * channels * taps * windows
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected
