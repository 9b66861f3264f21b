"""What is measured: the bytes that must move, and results that are checked before."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bench_device import DEVICES, open_device
from torch import Tensor

from sanctl.bench import unfold
from sanctl.bench.cases import DTYPES, OPERATORS, SHAPES, Case, InputSet
from sanctl.bench.check import TOLERANCES, WrongResultError, check, poisoned_memory, worst_error
from sanctl_ops import set_backend

CPU = torch.device("cpu")

each_device = pytest.mark.parametrize("name", DEVICES)


@pytest.fixture(autouse=True)
def _torch_backend() -> None:
    set_backend("torch")
    torch.manual_seed(0)


# Elements of one image, counted by hand: planes of the relation and the value, the relations and
# the weights of every tap.
RELATION = {"layer0": 4 * 112 * 112, "layer3": 64 * 14 * 14}
RELATIONS = {"layer0": 4 * 9 * 112 * 112, "layer3": 64 * 49 * 14 * 14}
VALUE = {"layer0": 16 * 112 * 112, "layer3": 256 * 14 * 14}
WEIGHTS = {"layer0": 2 * 9 * 112 * 112, "layer3": 32 * 49 * 14 * 14}


def elements(op: str, shape: str) -> dict[str, int]:
    """Elements read and written once: inputs and output; gradient, saved inputs, gradients."""
    relation, value = RELATION[shape], VALUE[shape]
    if op == "aggregation":
        forward = value + WEIGHTS[shape] + value
        return {"forward": forward, "backward": forward + value + WEIGHTS[shape]}
    planes = {"subtraction": 1, "subtraction2": 2, "concatenation": 2 + 1}[op] * relation
    return dict.fromkeys(("forward", "backward"), planes + RELATIONS[shape])


@pytest.mark.parametrize("op", ["subtraction", "subtraction2", "concatenation", "aggregation"])
@pytest.mark.parametrize("shape", ["layer0", "layer3"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_moved_bytes(op: str, shape: str, dtype: str, size: int) -> None:
    case = Case(op, shape, dtype, batch=3)
    drawn = InputSet.draw(case, CPU)
    for direction, count in elements(op, shape).items():
        assert drawn.moved_bytes(direction, case.operator.saved) == 3 * count * size


@pytest.mark.parametrize(("shape", "channels"), [("layer0", 4), ("layer3", 64)])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_moved_bytes_of_batch_normalisation(
    shape: str, channels: int, dtype: str, size: int
) -> None:
    case = Case("batch_norm_relu", shape, dtype, batch=3)
    drawn = InputSet.draw(case, CPU)
    relations = 3 * RELATIONS[shape] * size
    affine = 2 * channels * 4  # weight and bias, which stay in float32
    saved = case.operator.saved
    assert drawn.moved_bytes("forward", saved) == 2 * relations + affine
    assert drawn.moved_bytes("backward", saved) == 3 * relations + 2 * affine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_result_is_near_the_kink(shape: str, dtype: str) -> None:
    x, weight, bias = InputSet.draw(Case("batch_norm_relu", shape, dtype, 1), CPU).inputs
    channels = x.detach().double().transpose(0, 1).flatten(1)
    deviation, mean = (each.unsqueeze(1) for each in torch.std_mean(channels, 1, correction=0))
    before_relu = (channels - mean) / deviation * weight.unsqueeze(1) + bias.unsqueeze(1)
    assert before_relu.abs().min() > 0.05
    assert 0.3 < (before_relu > 0).double().mean() < 0.7
    assert min(len(weight.unique()), len(bias.unique())) > 1


def test_layer1_has_the_relations_of_san10_at_batch_64() -> None:
    layer = SHAPES["layer1"]
    count = 64 * layer.relation * layer.kernel_size**2 * layer.side**2
    assert count * 4 == 629_407_744


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_planes_lie_as_the_layout_says(layout: str) -> None:
    x, w = InputSet.draw(Case("aggregation", "layer3", "float16", 2, layout), CPU).inputs
    assert x.is_contiguous() == (layout == "contiguous")
    assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert w.is_contiguous()
    assert x.requires_grad
    assert w.requires_grad


@each_device
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operator_is_right(name: str, op: str, dtype: str) -> None:
    device, backends = open_device(name)
    for backend in backends:
        set_backend(backend)
        check(Case(op, "layer3", dtype, batch=6), backend, device)


def unwritten(k: int, x: Tensor, w: Tensor) -> Tensor:
    right = unfold.aggregation(k, x, w)
    out = torch.empty_like(right)
    out[..., :-1] = right[..., :-1]
    return out


def without_a_tap(k: int, x: Tensor, w: Tensor) -> Tensor:
    return unfold.aggregation(k, x, torch.cat((w[:, :, :-1], 0 * w[:, :, -1:]), 2))


def wrong_in_the_last_image(k: int, x: Tensor, w: Tensor) -> Tensor:
    right = unfold.aggregation(k, x, w)
    return torch.cat((right[:-1], right[-1:] + 0.2 * right[-1:].abs().max()))


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        wrong = grads[0].clone()
        wrong[-1, -1, -1, -1] = math.nan
        return wrong


def wrong_gradient(k: int, x: Tensor, w: Tensor) -> Tensor:
    return unfold.aggregation(k, _WrongGradient.apply(x), w)


@pytest.mark.parametrize(
    ("broken", "direction"),
    [
        (unwritten, "forward"),
        (without_a_tap, "forward"),
        (wrong_in_the_last_image, "forward"),
        (wrong_gradient, "backward"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_operator_is_found(
    broken: Callable[..., Tensor], direction: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = dataclasses.replace(OPERATORS["aggregation"], run=broken)
    monkeypatch.setitem(OPERATORS, "aggregation", entry)
    with pytest.raises(WrongResultError) as caught:
        check(Case("aggregation", "layer3", dtype, batch=5), "torch", CPU)
    words = ("aggregation", "layer3", dtype, direction, "backend torch", "error")
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_status == 1


def image_by_image(k: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([unfold.batch_norm_relu(image, weight, bias) for image in x.split(1)])


def without_weight(k: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return unfold.batch_norm_relu(x, weight / weight.detach(), bias)


def without_bias(k: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return unfold.batch_norm_relu(x, weight, bias - bias.detach())


def without_relu(k: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def with_fixed_statistics(k: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x.detach().to(weight.dtype), (0, 2, 3), correction=0)
    return F.relu(F.batch_norm(x, mean, variance, weight, bias))


@pytest.mark.parametrize(
    ("broken", "direction"),
    [
        (image_by_image, "forward"),
        (without_weight, "forward"),
        (without_bias, "forward"),
        (without_relu, "forward"),
        (with_fixed_statistics, "backward"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_batch_normalisation_is_found(
    broken: Callable[..., Tensor], direction: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = dataclasses.replace(OPERATORS["batch_norm_relu"], run=broken)
    monkeypatch.setitem(OPERATORS, "batch_norm_relu", entry)
    with pytest.raises(WrongResultError, match=f"{dtype}, batch 5, {direction}"):
        check(Case("batch_norm_relu", "layer3", dtype, batch=5), "torch", CPU)


@each_device
def test_memory_is_poisoned_for_a_while(name: str) -> None:
    device, _ = open_device(name)
    with poisoned_memory():
        assert torch.empty(1000, device=device).isnan().all()
        assert torch.ones(3, device=device, dtype=torch.bfloat16).new_empty(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors_are_relative_to_element_and_tensor() -> None:
    wanted = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)  # root mean square 2.5
    assert worst_error(wanted.float(), wanted) == 0
    assert worst_error(wanted + torch.tensor([0, 0, 0, 0.5]), wanted) == pytest.approx(0.2)
    assert worst_error(wanted + torch.tensor([0, 0.65, 0, 0]), wanted) == pytest.approx(0.1)
    assert worst_error(wanted * math.nan, wanted) == math.inf


def test_tolerances_are_some_roundings_of_each_dtype() -> None:
    assert TOLERANCES.keys() == DTYPES.keys()
    for name, dtype in DTYPES.items():
        assert torch.finfo(dtype).eps < TOLERANCES[name] < 0.1
