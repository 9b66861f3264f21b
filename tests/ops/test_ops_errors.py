"""Every unusable argument is refused with a ValueError that names the shapes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import DEVICES
from torch import Tensor

from sanctl_ops import aggregation, concatenation, subtraction, subtraction2

SHAPE = (2, 4, 6, 5)
WEIGHTS = (2, 2, 9, 30)


def image(shape: tuple[int, ...] = SHAPE, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def weights(shape: tuple[int, ...] = WEIGHTS, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


GEOMETRIES = [
    ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
    ({"stride": 0}, "stride must be at least 1, got 0"),
    ({"dilation": 0}, "dilation must be at least 1, got 0"),
    ({"padding": -1}, "padding must be at least 0, got -1"),
    ({"pad_mode": "circular"}, "pad_mode must be 'reflect' or 'zero', got 'circular'"),
    ({"padding": 5}, "reflect padding of 5 needs sides of at least 6 pixels"),
    ({"kernel_size": 7}, "a window of 7 x 7 pixels (kernel_size 7, dilation 1) is larger than"),
    ({"kernel_size": 3, "dilation": 4, "padding": 1}, "a window of 9 x 9 pixels"),
]


@pytest.mark.parametrize(("geometry", "message"), GEOMETRIES, ids=lambda value: str(value))
@pytest.mark.parametrize(
    "operator",
    [
        lambda x, **geometry: subtraction(x, **geometry),
        lambda x, **geometry: subtraction2(x, x, **geometry),
        lambda x, **geometry: concatenation(x, x, **geometry),
        lambda x, **geometry: aggregation(x, weights(), **geometry),
    ],
    ids=["subtraction", "subtraction2", "concatenation", "aggregation"],
)
def test_geometry(operator: Callable[..., Tensor], geometry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        operator(image(), **{"kernel_size": 3, **geometry})
    assert str(SHAPE) in str(raised.value)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: subtraction(image((4, 6, 5)), 3), ["x1", "3-d", "(4, 6, 5)"]),
        (lambda: subtraction2(image(), image((1, *SHAPE)), 3), ["x2", "5-d", "(1, 2, 4, 6, 5)"]),
        (lambda: subtraction(image(dtype=torch.int64), 3), ["int64", "(2, 4, 6, 5)", "bfloat16"]),
        (lambda: subtraction(image(dtype=torch.complex64), 3), ["complex64", "(2, 4, 6, 5)"]),
        (
            lambda: subtraction2(image(), image((2, 4, 6, 6)), 3),
            ["differ in shape", "(2, 4, 6, 5)", "(2, 4, 6, 6)"],
        ),
        (
            lambda: subtraction2(image(), image(dtype=torch.float64), 3),
            ["differ in dtype", "float32 and float64", "(2, 4, 6, 5)"],
        ),
        (
            lambda: subtraction2(image(), image(device="meta"), 3),
            ["different devices", "cpu and meta", "(2, 4, 6, 5)"],
        ),
        (lambda: concatenation(image((6, 5)), image(), 3), ["x1 must", "2-d", "(6, 5)"]),
        (lambda: concatenation(image(), image((6, 5)), 3), ["x2 must", "2-d", "(6, 5)"]),
        (
            lambda: concatenation(image(), image((2, 3, 6, 5)), 3),
            ["differ in shape", "(2, 4, 6, 5)", "(2, 3, 6, 5)"],
        ),
        (
            lambda: concatenation(image(), image(dtype=torch.float64), 3),
            ["differ in dtype", "float32 and float64", "(2, 4, 6, 5)"],
        ),
        (
            lambda: concatenation(image(), image(device="meta"), 3),
            ["different devices", "cpu and meta", "(2, 4, 6, 5)"],
        ),
        (lambda: aggregation(image((6, 5)), weights(), 3), ["x must", "2-d", "(6, 5)"]),
        (
            lambda: aggregation(image(), weights(dtype=torch.bfloat16), 3, padding=1),
            ["differ in dtype", "float32 and bfloat16", "(2, 4, 6, 5)", "(2, 2, 9, 30)"],
        ),
        (
            lambda: aggregation(image(), weights(device="meta"), 3, padding=1),
            ["different devices", "cpu and meta", "(2, 4, 6, 5)", "(2, 2, 9, 30)"],
        ),
        (
            lambda: aggregation(image(), weights((2, 3, 9, 30)), 3, padding=1),
            ["3 channels", "do not divide", "4 channels", "(2, 3, 9, 30)", "(2, 4, 6, 5)"],
        ),
        (
            lambda: aggregation(image(), weights((2, 8, 9, 30)), 3, padding=1),
            ["8 channels", "do not divide", "4 channels"],
        ),
        (
            lambda: aggregation(image(), weights((2, 0, 9, 30)), 3, padding=1),
            ["0 channels", "do not divide", "(2, 0, 9, 30)"],
        ),
        *[
            (
                lambda shape=shape: aggregation(image(), weights(shape), 3, padding=1),
                ["(N, Cw, K*K, P) = (2, Cw, 9, 30)", str(shape), "(2, 4, 6, 5)"],
            )
            for shape in [(2, 2, 25, 30), (2, 2, 9, 12), (1, 2, 9, 30), (2, 18, 30)]
        ],
    ],
    # A function has no name that is the same in every process.
    ids=lambda value: "call" if callable(value) else str(value),
)
def test_tensors(call: Callable[[], Tensor], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as raised:
        call()
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("device", DEVICES)
def test_the_limits_are_allowed(device: str) -> None:
    """Reflect padding one below the side, and a window that just fits."""
    assert subtraction(image(device=device), 13, padding=4).shape == (2, 4, 169, 2)
    assert subtraction(image(device=device), 5).shape == (2, 4, 25, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tensor_beside_a_cpu_tensor() -> None:
    with pytest.raises(ValueError, match="cuda:0 and cpu"):
        aggregation(image(device="cuda"), weights(), 3, padding=1)
