"""What backward passes take from forward ones may lie in memory as torch.compile likes it."""

import pytest
import torch
from op_cases import DEVICES, last_dimension_outermost
from saved_cases import RUNS, Run


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_do_not_hang_on_the_layout_of_what_is_saved(run: Run, device: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    out, leaves = run(device)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    with last_dimension_outermost():
        out, leaves = run(device)
    found = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
