"""Patchwise attention: against float64 autograd through its definition, and as torch sees it."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_cases import CHANNELS_LAST, DEVICES, LAYOUTS
from patchwise_cases import (
    CASES,
    HOSTILE,
    Case,
    Inputs,
    attended,
    away_from_kinks,
    differentiated,
    distances,
    expected,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sanctl_ops import (
    Norm,
    patchwise_attention,
    patchwise_attention_obstacle,
    patchwise_formulas,
)
from sanctl_ops.kernels import patchwise_plan, runtime
from sanctl_ops.kernels.patchwise_plan import Sizes
from sanctl_ops.relation_statistics import relation_statistics

each_device = pytest.mark.parametrize("device", DEVICES)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check(x: Inputs, tolerance: float) -> None:
    """Hold the output and every gradient against autograd."""
    truth = x.to("cpu", torch.float64, torch.float64)
    out = expected(truth)
    grad = torch.randn_like(out)
    far = distances(attended(x, grad.to(x.query.device)), differentiated(truth, out, grad))
    assert max(far.values()) < tolerance, far


@each_case
@each_device
def test_agrees_with_autograd(case: Case, device: str) -> None:
    check(case.inputs().to(device, torch.float64, torch.float64), 1e-9)


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
@each_device
def test_hostile_images(case: Case, device: str) -> None:
    check(case.inputs().to(device, torch.float64, torch.float64), 1e-7)


@pytest.mark.parametrize("case", [CASES[6], *HOSTILE], ids=lambda case: case.name)
@each_device
def test_float32(case: Case, device: str) -> None:
    check(case.inputs().to(device, torch.float32, torch.float32), 1e-3)


@pytest.mark.parametrize("case", [*CASES, HOSTILE[0]], ids=lambda case: case.name)
@each_device
def test_float32_where_tf32_is_allowed(case: Case, device: str) -> None:
    torch.set_float32_matmul_precision("high")
    # Images that are exact as halves: in so few pixels, one decision of the first ReLU would show.
    x = away_from_kinks(case, device, torch.float16).to(device, torch.float32, torch.float32)
    truth = x.to("cpu", torch.float64, torch.float64)
    out = expected(truth)
    grad = torch.randn_like(out)
    far = distances(attended(x, grad.to(device)), differentiated(truth, out, grad))
    # Few gradients are summed up for its two channels, and may cancel out.
    assert far.pop("norm2.weight") < 2e-2
    assert max(far.values()) < 3e-3, far


def by_autocast(x: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """Run the definition under autocast, as a network in its dtype does."""
    with torch.autocast(x.query.device.type, x.query.dtype):
        return differentiated(x, expected(x), grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *HOSTILE], ids=lambda case: case.name)
@each_device
def test_sixteen_bits_are_as_near_as_autocast(case: Case, dtype: torch.dtype, device: str) -> None:
    x = away_from_kinks(case, device, dtype)
    truth = x.to("cpu", torch.float64, torch.float64)
    out = expected(truth)
    grad = torch.randn_like(out).to(dtype)
    gradients = differentiated(truth, out, grad.double())
    far = distances(attended(x, grad.to(device)), gradients)
    autocast = distances(by_autocast(x, grad.to(device)), gradients)
    assert all(d <= 1.5 * autocast[name] + 1e-3 for name, d in far.items()), (far, autocast)


@each_device
def test_statistics_are_those_of_the_relation(device: str) -> None:
    x = CASES[5].inputs().to(device, torch.float64, torch.float64)
    result = patchwise_attention(*x.arguments)
    relation = torch.ops.sanctl.concatenation(x.query, x.key, 7, 1, 3, 1, "reflect")
    variance, mean = torch.var_mean(relation, (0, 2, 3), correction=0)
    torch.testing.assert_close(result.mean1, mean)
    torch.testing.assert_close(result.variance1, variance)
    assert not any(t.requires_grad for t in result[1:])


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_relation_statistics_far_from_zero(kernel_size: int) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(3, 4, 5, 8, dtype=torch.float64) + 1e5 for _ in range(2))
    window = (kernel_size, 1, kernel_size // 2, 1, "reflect")
    relation = torch.ops.sanctl.concatenation(query, key, *window)
    variance, mean = torch.var_mean(relation, (0, 2, 3), correction=0)
    actual = relation_statistics(query, key, kernel_size)
    torch.testing.assert_close(actual, (mean, variance), rtol=1e-9, atol=0)


def test_running_statistics_are_returned_as_they_are() -> None:
    x = replace(CASES[5], training=False).inputs()
    result = patchwise_attention(*x.arguments)
    statistics = (*x.norm1[2:4], *x.norm2[2:4])
    assert all(a.equal(b) for a, b in zip(result[1:], statistics, strict=True) if b is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each_device
def test_two_runs_are_bit_identical(dtype: torch.dtype, device: str) -> None:
    torch.set_float32_matmul_precision("high")
    x = Case("", 12, 12, 7, 16, 8, batch=5).inputs().to(device, dtype, torch.float32)
    grad = torch.ones_like(x.value)
    first, second = attended(x, grad), attended(x, grad)
    assert all(first[name].equal(second[name]) for name in first)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Case("", 5, 6, 3, batch=5).inputs()
    grad = torch.randn_like(x.value)
    whole = attended(x, grad)
    monkeypatch.setattr(patchwise_formulas, "CHUNK", 2 * 4 * 10 * 30)
    assert max(distances(attended(x, grad), whole).values()) < 1e-12


def flat(x: Inputs) -> tuple[Any, ...]:
    """Return the arguments as the custom operator takes them."""
    parts = [part if isinstance(part, Norm) else (part,) for part in x.arguments]
    return tuple(item for part in parts for item in part)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in {"wider", "contiguous", "sliced", "some_channels_last"}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_device
def test_opcheck(case: Case, training: bool, dtype: torch.dtype, device: str) -> None:
    parameters = torch.promote_types(dtype, torch.float32)
    x = replace(case, training=training).inputs().to(device, dtype, parameters)
    torch.library.opcheck(torch.ops.sanctl.patchwise_attention, flat(x))
    out, *statistics, hidden = torch.ops.sanctl.patchwise_attention(*flat(x))
    known = [
        (*(t.detach() for t in (*norm[:2], *pair)), norm.eps)
        for norm, pair in zip((x.norm1, x.norm2), (statistics[:2], statistics[2:]), strict=True)
    ]
    images = [t.detach() for t in (out, x.query, x.key, x.value, hidden)]
    second = [t.detach() for t in (x.weight2, x.bias2)]
    by_batch = (training, training)
    torch.library.opcheck(
        torch.ops.sanctl.patchwise_attention_backward,
        (*images, *known[0], x.weight1.detach(), *known[1], *second, x.kernel_size, *by_batch),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@each_device
def test_strides(layout: str, device: str) -> None:
    x = Case("", 5, 6, 3, layout=layout).inputs().to(device, torch.float32, torch.float32)
    out = patchwise_attention(*x.arguments).out
    grads = torch.autograd.grad(out, x.leaves[:3], torch.ones_like(out))
    expected = torch.channels_last if layout in CHANNELS_LAST else torch.contiguous_format
    assert all(image.is_contiguous(memory_format=expected) for image in (out, *grads))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
@each_device
def test_compiles_without_a_graph_break(backend: str, dynamic: bool, device: str) -> None:
    x = Case("", 6, 7, 3).inputs().to(device, torch.float64, torch.float64)
    others = x.arguments[2:]

    def layer(query: Tensor, key: Tensor) -> Tensor:
        result = patchwise_attention(2 * query, key, *others)
        return result.out.sin() + result.mean2.sum()

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    out, wanted = compiled(x.query, x.key), layer(x.query, x.key)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(out, x.leaves, grad), torch.autograd.grad(wanted, x.leaves, grad)
    )


def test_flops() -> None:
    x = Case("", 5, 6, 3).inputs()
    with FlopCounterMode(display=False) as forward:
        out = patchwise_attention(*x.arguments).out
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    pixels, relation, hidden, channels, taps = 2 * 30, 40, 2, 16, 9
    terms = pixels * (relation * hidden + hidden * hidden * taps + channels * taps)
    assert forward.get_total_flops() == 2 * terms
    assert backward.get_total_flops() == 4 * terms


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": torch.zeros(2, 4, 6, 8)}, r"query \(2, 4, 6, 7\) and key \(2, 4, 6, 8\) differ"),
        ({"value": torch.zeros(2, 16, 6, 8)}, r"value \(2, 16, 6, 8\) differ in images or pixels"),
        ({"value": torch.zeros(2, 15, 6, 7)}, "do not divide"),
        ({"value": torch.zeros(2, 16, 6, 7, dtype=torch.float16)}, "float32 and float16"),
        ({"query": torch.zeros(4, 6, 7)}, r"query must be \(N, C, H, W\)"),
        ({"weight1": torch.zeros(2, 39)}, r"weight1 must be \(2, 40\), got \(2, 39\)"),
        ({"weight1": torch.zeros(2, 40, 1, 1)}, r"weight1 must be \(Cw, rel"),
        ({"weight2": torch.zeros(18, 3)}, r"weight2 must be \(18, 2\)"),
        ({"bias2": torch.zeros(18, device="meta")}, "different devices"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"kernel_size": 13}, "reflect padding of 6"),
        (
            {"norm2": Norm(torch.ones(2), torch.ones(3), None, None, 0)},
            r"norm2.bias must be \(2,\)",
        ),
        ({"norm1": Norm(torch.ones(40), torch.ones(40), torch.ones(40), None, 0)}, "not both"),
    ],
    ids=str,
)
def test_unusable_arguments(changed: dict[str, Any], message: str) -> None:
    x = Case("", 6, 7, 3).inputs().to("cpu", torch.float32, torch.float32)
    with pytest.raises(ValueError, match=message):
        patchwise_attention(*(vars(x) | changed).values())


SAN10_LAYER = Sizes(256, 28, 28, relation=32, hidden=16, share=8, kernel_size=7)


def reason(dtype: torch.dtype = torch.bfloat16, **changed: int) -> str | None:
    return patchwise_plan.obstacle(dtype, replace(SAN10_LAYER, **changed))


def test_a_reason_tells_why_no_kernels_run() -> None:
    assert reason() is None
    assert "float16, bfloat16 and float32, not float64" in str(reason(torch.float64))
    assert "3, 5 and 7 taps, not 9" in str(reason(kernel_size=9))
    assert "not 128 shared by 8" in str(reason(hidden=128))
    assert "not 16 shared by 16" in str(reason(share=16))
    assert "1024 relation channels do not fit" in str(reason(relation=1024))
    assert "do not take 1000000 such images" in str(reason(images=1000000))
    x = CASES[0].inputs()
    assert "CUDA device, not cpu" in str(patchwise_attention_obstacle(x.query, x.value, 2, 3))


def test_float32_products_are_exact_unless_tf32_is_allowed() -> None:
    assert "asked to be exact; allowing TF32, or mixed precision" in str(reason(torch.float32))
    torch.backends.cuda.matmul.allow_tf32 = True
    assert reason(torch.float32) is None
    torch.set_float32_matmul_precision("highest")
    assert reason(torch.float32) is not None


@pytest.mark.parametrize("sides", [(4, 4), (5, 31), (15, 17), (7, 7), (112, 112), (29, 211)])
@pytest.mark.parametrize("hidden", [2, 8, 16, 32, 64])
def test_tiles_cover_images_and_fit(sides: tuple[int, int], hidden: int) -> None:
    sizes = Sizes(2, *sides, relation=2 * hidden, hidden=hidden, share=8, kernel_size=7)
    for needed in (patchwise_plan.bytes_of_hidden, patchwise_plan.bytes_of_slopes):
        tiling = patchwise_plan.tiling(sizes, needed)
        assert tiling is not None
        for side, tiles, most in zip(
            sides, (tiling.down, tiling.across), (tiling.rows, tiling.columns), strict=True
        ):
            starts = [i * side // tiles for i in range(tiles + 1)]
            lengths = [b - a for a, b in itertools.pairwise(starts)]
            assert max(lengths) == most
            # What lies beyond a border mirrors pixels of the tile there.
            assert min(lengths) > 3
        assert needed(sizes, tiling) <= runtime.MOST_SHARED_BYTES
