"""What backward passes take from forward ones may lie in memory as torch.compile likes it."""

import shutil

import pytest
import torch
from op_cases import DEVICES, last_dimension_outermost
from saved_cases import RUNS, Run

EACH = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def check(run: Run, device: str) -> None:
    """Compare gradients from what is saved as it is with those from what is laid out anew."""
    torch.backends.cuda.matmul.allow_tf32 = True
    out, leaves = run(device)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    with last_dimension_outermost():
        out, leaves = run(device)
    found = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_do_not_hang_on_the_layout_of_what_is_saved(run: Run, device: str) -> None:
    check(run, device)


@EACH
@pytest.mark.usefixtures("_kernels_on_cpu")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_take_what_is_saved_in_any_layout(run: Run) -> None:
    check(run, "cpu")
