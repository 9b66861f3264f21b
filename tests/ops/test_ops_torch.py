"""The operators as torch sees them: schema, strides, torch.compile and the FLOP counter."""

import pytest
import torch
from op_cases import CASES, DEVICES, OPERATORS, Case, laid_out, make_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sanctl_ops import aggregation, concatenation, subtraction, subtraction2

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


@pytest.mark.parametrize("name", ["subtraction2", "concatenation", "aggregation"])
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
    taps, windows = case.weight_shape[2:]
    for operator, relation_shape in (
        (torch.ops.sanctl.subtraction2_backward, (case.channels, taps, windows)),
        (torch.ops.sanctl.concatenation_backward, (case.channels * (taps + 1), 1, windows)),
    ):
        torch.library.opcheck(
            operator,
            (
                laid_out((case.batch, *relation_shape), case.layout).to(device),
                *case.image_shape[2:],
                case.layout == "channels_last",
                *case.geometry,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )


def attend(query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
    """Chain all operators as self-attention layers do."""
    relation = subtraction2(query, key, 3, padding=1) + subtraction(position, 3, padding=1)
    patch = concatenation(query, key, 3, padding=1)[:, query.shape[1] :].view_as(relation)
    return aggregation(value * 2, relation * patch, 3, padding=1)


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
    terms = batch * channels * taps * windows
    expected = {
        "subtraction": (terms, 2 * terms),
        "subtraction2": (terms, 2 * terms),
        "concatenation": (0, terms + batch * channels * windows),
        "aggregation": (2 * terms, 4 * terms),
    }
    assert (forward.get_total_flops(), backward.get_total_flops()) == expected[name]
