"""What a launch hands to CuPy; nothing runs."""

from typing import Any

import numpy as np
import pytest
import torch

from sanctl_ops.kernels import runtime
from sanctl_ops.kernels.geometry import WINDOW, structure
from sanctl_ops.kernels.runtime import Kernel, kernel, launch

STREAM = object()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let the CPU pass for the current device, and write down each call of CuPy's function."""
    called: list[tuple[Any, ...]] = []

    def function(grid: Any, block: Any, passed: Any, shared_mem: int, stream: Any) -> None:
        called.append((grid, block, passed, shared_mem, stream))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(runtime, "_shared_with_cupy", lambda *named: {(7, None): STREAM}[named])
    monkeypatch.setattr(runtime, "_function", lambda *wanted: function)
    return called


def test_arguments_are_passed_in_the_width_that_kernels_take(calls: list[tuple[Any, ...]]) -> None:
    x, window = torch.ones(3), structure((1,) * 8, WINDOW)
    launch(Kernel("a.cu", "a"), x.device, 2, 32, (x, 5, 0.5, np.uint32(6), window), 64)
    ((grid, block, passed, shared_bytes, stream),) = calls
    assert (grid, block, shared_bytes, stream) == ((2,), (32,), 64, STREAM)
    assert passed[:4] == [x.data_ptr(), 5, 0.5, 6]
    assert [type(a) for a in passed[:4]] == [int, np.int32, float, np.uint32]
    assert passed[4] is window


def test_no_blocks_are_no_launch(calls: list[tuple[Any, ...]]) -> None:
    launch(Kernel("a.cu", "a"), torch.device("cpu"), 0, 32, ())
    assert calls == []


def test_a_structure_knows_its_own_address() -> None:
    first, second = (structure((i,) * 8, WINDOW) for i in range(2))
    for x in (first, second, first):
        assert x.__array_interface__["data"][0] == x.ctypes.data
    assert first.tobytes() == np.zeros(8, np.int32).tobytes()


def test_numbers_and_truth_make_different_kernels() -> None:
    assert kernel("a.cu", "a", 1).expression == "a<1>"
    assert kernel("a.cu", "a", True).expression == "a<true>"
    assert kernel("a.cu", "a", torch.float16, 0) is kernel("a.cu", "a", torch.float16, 0)
