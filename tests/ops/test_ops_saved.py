"""What backward passes take from forward ones may lie in memory as torch.compile likes it."""

import shutil

import pytest
import torch
from op_cases import DEVICES, OPERATORS, last_dimension_outermost
from saved_cases import RUNS, Run
from torch import Tensor

# What is summed up in another order is off by.
ROUNDING = 1e-4


def gradients(run: Run, device: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return gradients from what is saved as it is, and from what is laid out anew."""
    torch.backends.cuda.matmul.allow_tf32 = True
    out, leaves = run(device)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    with last_dimension_outermost():
        out, leaves = run(device)
    return expected, torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_do_not_hang_on_the_layout_of_what_is_saved(run: Run, device: str) -> None:
    expected, found = gradients(run, device)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_take_what_is_saved_in_any_layout(name: str) -> None:
    expected, found = gradients(RUNS[name], "cpu")
    # Operators of windows have kernels of their own for strided tensors.
    bound = ROUNDING if name in OPERATORS else 0
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
