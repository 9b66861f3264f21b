"""Pairwise attention: against autograd through its definition, in every type, size and layout."""

from typing import Any

import pytest
import torch
from op_cases import CHANNELS_LAST, DEVICES, LAYOUTS
from pairwise_oracle import (
    CASES,
    EPS,
    Inputs,
    PairwiseCase,
    distance,
    draw,
    fused,
    gradients,
    unfused,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sanctl_ops import (
    Norm,
    pairwise_attention,
    pairwise_attention_obstacle,
    pairwise_formulas,
)
from sanctl_ops.kernels.halves import DTYPES
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_tiles import obstacle

each_device = pytest.mark.parametrize("device", DEVICES)
each_case = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
MATMUL = torch.backends.cuda.matmul
PLAIN = PairwiseCase("plain", 8, 4, 9, 10, 5, batch=3)


def both(inputs: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the output and the gradients, each beside what the definition gives in float64."""
    exact = inputs.converted("cpu", torch.float64, torch.float64)
    out, expected = fused(inputs).out, unfused(exact)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    found = gradients(out, inputs, grad.to(out.device))
    pairs = zip(found.items(), gradients(expected, exact, grad).values(), strict=True)
    return {"out": (out, expected)} | {name: (a, b) for (name, a), b in pairs}


def assert_agrees(inputs: Inputs, tolerance: float) -> None:
    pairs = both(inputs)
    bias, _ = pairs.pop("bias2")
    assert not bias.any()
    apart = {name: distance(*pair) for name, pair in pairs.items()}
    assert max(apart.values()) < tolerance, apart


@each_case
@each_device
def test_agrees_with_the_definition(case: PairwiseCase, device: str) -> None:
    assert_agrees(draw(case).converted(device, torch.float64, torch.float64), 1e-9)


@pytest.mark.parametrize("images", [1, 2])
def test_images_by_parts(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(PLAIN)
    at_once = images * 4 * PLAIN.kernel_size**2 * (PLAIN.rel + 2) * PLAIN.height * PLAIN.width
    monkeypatch.setattr(pairwise_formulas, "AT_ONCE", at_once)
    assert_agrees(inputs, 1e-9)


def far_from_zero(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return query + 100, key - 100


def nearly_constant(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    level = 5 * torch.randn(*query.shape[:2], 1, 1, dtype=query.dtype)
    return 1e-3 * query + level, 1e-3 * key + level


def large(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return 1e4 * query, 1e4 * key


HOSTILE = [far_from_zero, nearly_constant, large]


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
@each_device
def test_hostile_planes(spoil, device: str) -> None:  # type: ignore[no-untyped-def]
    assert_agrees(draw(PLAIN, spoil).converted(device, torch.float64, torch.float64), 1e-8)


@each_case
@each_device
def test_float32(case: PairwiseCase, device: str) -> None:
    MATMUL.allow_tf32 = False
    assert_agrees(draw(case).converted(device, torch.float32, torch.float32), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spoil", [None, *HOSTILE[:2]], ids=["plain", "far", "nearly_constant"])
@each_device
def test_no_further_from_the_truth_than_autocast(spoil, dtype, device: str) -> None:  # type: ignore[no-untyped-def]
    MATMUL.allow_tf32 = True
    as_drawn = [spoil] if spoil else []
    # Which side of a ReLU rounding puts a value on is chance, which a few draws even out.
    drawn = [draw(PLAIN, *as_drawn, seed=seed) for seed in range(4)]
    inputs = [each.converted(device, dtype, torch.float32) for each in drawn]
    assert_no_further_than_autocast(inputs, dtype)


# Those of SAN10, on planes of several tiles, one of them ragged, and others.
LAYERS = [
    PairwiseCase("layer0", 4, 2, 57, 66, 3, batch=3, layout="channels_last"),
    PairwiseCase("layer1", 16, 8, 29, 56, 7, layout="channels_last"),
    PairwiseCase("layer2", 32, 16, 28, 28, 7, layout="channels_last"),
    PairwiseCase("layer3", 64, 32, 14, 14, 7, layout="channels_last"),
    PairwiseCase("layer4", 128, 64, 7, 7, 7, batch=3, layout="channels_last"),
    PairwiseCase("evaluation", 24, 16, 9, 300, 5, running1=True, running2=True),
    PairwiseCase("repeated", 12, 4, 4, 7, 7, group=4, batch=5, layout="sliced"),
]


@pytest.mark.parametrize("case", LAYERS, ids=[c.name for c in LAYERS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_kernels_for_every_layer(case: PairwiseCase, dtype: torch.dtype, device: str) -> None:
    MATMUL.allow_tf32 = True
    inputs = draw(case).converted(device, dtype, torch.float32)
    arguments = (inputs.query, inputs.value, case.shared, case.kernel_size)
    assert pairwise_attention_obstacle(*arguments) is None
    assert_no_further_than_autocast([inputs], dtype)


def test_obstacles_are_told() -> None:
    def told(relation: int, weights: int, channels: int, size: int) -> str | None:
        return obstacle(torch.float16, Layout(2, 6, 5, relation, weights, channels, size))

    assert told(4, 2, 16, 3) is None
    assert "float64" in str(obstacle(torch.float64, Layout(2, 6, 5, 4, 2, 16, 3)))
    layout = Layout(2, 6, 5, 4, 2, 16, 3)
    MATMUL.allow_tf32 = False
    assert "exact; allowing TF32, or mixed precision" in str(obstacle(torch.float32, layout))
    MATMUL.allow_tf32 = True
    assert obstacle(torch.float32, layout) is None
    assert "kernel_size" in str(told(4, 2, 16, 9))
    assert "16 weight channels" in str(told(4, 16, 128, 3))
    assert "share a weight" in str(told(4, 2, 4, 3))
    assert "129 channels" in str(told(129, 2, 16, 3))
    inputs = draw(CASES[0])
    sizes = (inputs.query, inputs.value, CASES[0].shared, CASES[0].kernel_size)
    assert "CUDA device, not cpu" in str(pairwise_attention_obstacle(*sizes))


def assert_no_further_than_autocast(drawn: list[Inputs], dtype: torch.dtype) -> None:
    """Hold mean errors against those of the definition that keeps all tensors in bfloat16."""
    errors = [_errors_and_autocasts(inputs, dtype) for inputs in drawn]
    for name in errors[0].keys() - {"bias2"}:
        found, autocast = (sum(each[name][i] for each in errors) / len(drawn) for i in (0, 1))
        assert found < autocast + 1e-3, name


def _errors_and_autocasts(inputs: Inputs, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    pairs = both(inputs)
    kept = inputs.converted("cpu", dtype, torch.float32)
    out = unfused(kept, torch.bfloat16)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    autocast = {"out": out} | gradients(out, kept, grad)
    return {
        name: (distance(actual, expected), distance(autocast[name], expected))
        for name, (actual, expected) in pairs.items()
    }


@each_case
def test_statistics(case: PairwiseCase) -> None:
    inputs = draw(case)
    found = fused(inputs)
    query, key = (torch.cat((x, inputs.position.expand(case.batch, -1, -1, -1)), 1)
                  for x in (inputs.query, inputs.key))  # fmt: skip
    radius, size = case.kernel_size // 2, case.kernel_size
    padded = torch.nn.functional.pad(key, [radius] * 4, mode="reflect") if radius else key
    taps = padded.unfold(2, size, 1).unfold(3, size, 1)
    relation = query[..., None, None] - taps
    norm = inputs.norm1
    mean, variance = relation.mean((0, 2, 3, 4, 5)), relation.var((0, 2, 3, 4, 5), correction=0)
    if norm.mean is not None and norm.variance is not None:
        mean, variance = norm.mean, norm.variance
    torch.testing.assert_close(found.mean1, mean)
    torch.testing.assert_close(found.variance1, variance)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shape = (-1, 1, 1, 1, 1)
    z = ((relation - mean.view(shape)) * scale.view(shape) + norm.bias.view(shape)).relu()
    y = torch.einsum("oc,nchwij->nohwij", inputs.weight1, z)
    mean, variance = y.mean((0, 2, 3, 4, 5)), y.var((0, 2, 3, 4, 5), correction=0)
    if inputs.norm2.mean is not None and inputs.norm2.variance is not None:
        mean, variance = inputs.norm2.mean, inputs.norm2.variance
    torch.testing.assert_close(found.mean2, mean)
    torch.testing.assert_close(found.variance2, variance)
    assert not any(x.requires_grad for x in found[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@each_device
def test_strides(layout: str, device: str) -> None:
    case = PairwiseCase("strides", 8, 4, 5, 6, 3, layout=layout)
    inputs = draw(case).converted(device, torch.float32, torch.float32)
    out = fused(inputs).out
    planes = (inputs.query, inputs.key, inputs.value)
    grads = torch.autograd.grad(out, planes, torch.ones_like(out))
    expected = torch.channels_last if layout in CHANNELS_LAST else torch.contiguous_format
    assert all(x.is_contiguous(memory_format=expected) for x in (out, *grads))


@each_device
def test_two_runs_give_the_same_bits(device: str) -> None:
    inputs = draw(PLAIN).converted(device, torch.bfloat16, torch.float32)
    first, second = both(inputs), both(inputs)
    assert all(first[name][0].equal(second[name][0]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_device
def test_operator_is_well_formed(device: str, dtype: torch.dtype) -> None:
    case = PairwiseCase("small", 4, 2, 3, 4, 3, batch=1, layout="channels_last")
    inputs = draw(case).converted(device, dtype, torch.float32)
    planes = (inputs.query, inputs.key, inputs.value, inputs.position)
    for running in (False, True):
        norms = [
            (n.weight, n.bias, n.bias.detach() * running, n.weight.detach().abs(), EPS)
            if running
            else (n.weight, n.bias, None, None, EPS)
            for n in (inputs.norm1, inputs.norm2)
        ]
        weights = (inputs.weight2, inputs.bias2)
        torch.library.opcheck(
            torch.ops.sanctl.pairwise_attention.default,
            (*planes, *norms[0], inputs.weight1, *norms[1], *weights, case.kernel_size),
        )


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break() -> None:
    inputs = draw(PairwiseCase("small", 4, 2, 3, 4, 3)).converted(
        "cpu", torch.float32, torch.float32
    )
    expected = fused(inputs).out
    compiled = torch.compile(lambda *x: pairwise_attention(*x).out, fullgraph=True)
    actual = compiled(*inputs.fields())
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    found, wanted = gradients(actual, inputs, grad), gradients(expected, inputs, grad)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])


def test_flops() -> None:
    case = CASES[0]
    inputs = draw(case)
    with FlopCounterMode(display=False) as counter:
        fused(inputs).out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    relations = case.batch * case.height * case.width * case.kernel_size**2
    rel, shared = case.rel, case.shared
    forward = 2 * relations * (rel * (rel + 2) + shared * rel + case.channels)
    assert counts[torch.ops.sanctl.pairwise_attention] == forward
    assert counts[torch.ops.sanctl.pairwise_attention_backward] == 2 * forward


WRONG: dict[str, dict[str, Any]] = {
    "query must be": {"query": torch.zeros(4, 4)},
    "and key .* differ in shape": {"key": torch.zeros(2, 4, 7, 7)},
    "and value .* differ in images or pixels": {"value": torch.zeros(2, 16, 7, 7)},
    "position must be": {"position": torch.zeros(2, 2, 7, 6)},
    "differ in dtype": {"key": torch.zeros(2, 4, 7, 6, dtype=torch.float16)},
    "norm1.weight must be": {"norm1": Norm(torch.ones(4), torch.ones(6), None, None, EPS)},
    "norm2 has a running mean or variance, but not both": {
        "norm2": Norm(torch.ones(4), torch.ones(4), torch.ones(4), None, EPS)
    },
    "weight1 must be": {"weight1": torch.zeros(4, 4)},
    "weight2 must be": {"weight2": torch.zeros(3, 4)},
    "bias2 must be": {"bias2": torch.zeros(3)},
    "must be odd": {"kernel_size": 2},
    "reflect padding": {"kernel_size": 13},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    inputs = draw(CASES[0]).converted("cpu", torch.float32, torch.float32)
    arguments = dict(zip(inputs.__dataclass_fields__, inputs.fields(), strict=True))
    arguments.update(WRONG[message])
    with pytest.raises(ValueError, match=message):
        pairwise_attention(**arguments)


def test_no_images() -> None:
    inputs = draw(CASES[0])
    planes = (inputs.query[:0], inputs.key[:0], inputs.value[:0])
    with pytest.raises(ValueError, match="is empty"):
        pairwise_attention(*planes, *inputs.fields()[3:])
