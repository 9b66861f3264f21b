"""Five networks against values that the published implementations gave in float64.

golden.json holds, for each, every state_dict key with its shape, the parameter count, logits in
both modes, the loss, the norm of every parameter's gradient and the running statistics.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_models import Network, build_model
from sanctl_models.fusion import use_attention

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden.json").read_text())
# Gradients that are zero in exact arithmetic (a bias before a batch norm or a softmax, or one that
# a difference cancels) are sums of rounding errors, so they can only be held against the largest
# gradient of the network: float64 rounds at 1e-16 of it, and the sums have some 1e4 terms. Of the
# golden norms, those that are zero are at most 1.2e-15 of the largest, the others 1.3e-4 or more.
ZERO_GRADIENT = 1e-12


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = [pytest.mark.gpu, NEEDS_CUDA]


@dataclass(frozen=True)
class Tolerance:
    """What values and gradients are off by relatively, and zero ones as a share of the largest."""

    relative: float
    gradient: float
    zero_gradient: float


FLOAT64 = Tolerance(1e-8, 1e-8, ZERO_GRADIENT)
# Rounding decides on which side of a ReLU some values come to lie, which moves gradients further
# than it moves values: on a CPU by 2 %. The products of the non-local network amplify rounding
# most: its logits are off by 1e-4 on a CPU and by 1.1e-3 on an H200, all others by 3e-5 or less.
FLOAT32 = Tolerance(2e-3, 5e-2, 1e-3)
# The gradients of positions are sums that nearly cancel: one is off by 5 % in this order of sums.
FUSED_FLOAT32 = Tolerance(2e-3, 0.1, 1e-3)


@dataclass
class Run:
    network: Network
    keys: list[list[Any]]
    train_logits: Tensor
    train_loss: float
    grad_norms: dict[str, float]
    statistics: dict[str, list[float]]
    eval_logits: Tensor


def golden_tensor(index: int, key: str, like: Tensor) -> Tensor:
    """Make the weight that the golden values were computed with."""
    if not like.is_floating_point():
        return like
    drawn = np.random.RandomState(index).standard_normal(like.numel()).astype(np.float32)
    r = drawn.astype(np.float64).reshape(like.shape)
    if key.endswith("running_var"):
        r = 1 + 0.2 * np.abs(r)
    elif key.endswith("running_mean"):
        r = 0.1 * r
    elif r.ndim == 1:
        r = 1 + 0.1 * r if key.endswith(".weight") else 0.1 * r
    else:
        r = r * np.sqrt(2 / np.prod(r.shape[1:])) * 0.7
    return torch.from_numpy(r.astype(np.float32)).double()


def run_golden(
    arch: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float64
) -> Run:
    network = build_model(**arch).double()
    keys = [[key, list(value.shape)] for key, value in network.state_dict().items()]
    state = sorted(network.state_dict().items())
    network.load_state_dict(
        {key: golden_tensor(index, key, value) for index, (key, value) in enumerate(state)}
    )
    network.to(device, dtype)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    shape = (2, 1 if arch.get("grayscale") else 3, 128, 128)
    drawn = np.random.RandomState(1234).standard_normal(shape).astype(np.float32)
    images = torch.from_numpy(drawn).to(device, dtype)
    train_logits = network(images)
    loss = F.cross_entropy(train_logits, torch.tensor([0, 7], device=device))
    loss.backward()
    statistics = {
        key: [value.mean().item(), value.std().item()]
        for key, value in network.state_dict().items()
        if key.endswith(("running_mean", "running_var"))
    }
    gradients = {key: p.grad for key, p in network.named_parameters()}
    norms = {key: g.norm().item() for key, g in gradients.items() if g is not None}
    network.eval()
    with torch.no_grad():
        eval_logits = network(images)
    return Run(network, keys, train_logits.detach(), loss.item(), norms, statistics, eval_logits)


@pytest.fixture
def _exact_convolutions() -> None:
    """Without the 10 bits of TF32, which torch allows for convolutions only."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_with_every_golden_value(name: str) -> None:
    golden = GOLDEN[name]
    check(run_golden(golden["arch"]), golden, FLOAT64)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.usefixtures("_exact_convolutions")
@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_on_cuda(name: str) -> None:
    golden = GOLDEN[name]
    check(run_golden(golden["arch"], "cuda"), golden, FLOAT64)
    check(run_golden(golden["arch"], "cuda", torch.float32), golden, FLOAT32)


@pytest.mark.usefixtures("_exact_convolutions")
@pytest.mark.parametrize("name", ["san10_pairwise", "san10_patchwise"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_agrees_with_attention_in_one_operator(name: str, device: str) -> None:
    golden = GOLDEN[name]
    with use_attention("fused"):
        check(run_golden(golden["arch"], device, torch.float32), golden, FUSED_FLOAT32)


def check(run: Run, golden: dict[str, Any], tolerance: Tolerance) -> None:
    relative = tolerance.relative
    # In order, too: an optimizer's saved state counts parameters by their place.
    assert run.keys == golden["keys"]
    assert sum(p.numel() for p in run.network.parameters()) == golden["params"]
    check_logits(run.train_logits, golden["train_logits"], relative)
    assert run.train_loss == pytest.approx(golden["train_loss"], rel=relative)
    check_logits(run.eval_logits, golden["eval_logits"], relative)
    largest = golden["eval_absmax"]
    assert run.eval_logits.sum().item() == pytest.approx(
        golden["eval_sum"], abs=relative * largest * math.sqrt(run.eval_logits.numel())
    )
    assert run.eval_logits.abs().max().item() == pytest.approx(largest, rel=relative)
    assert run.statistics.keys() == golden["bn_after"].keys()
    for key, (mean, std) in golden["bn_after"].items():
        close = pytest.approx([mean, std], rel=relative, abs=relative * std)
        assert run.statistics[key] == close, key
    check_gradients(run.grad_norms, golden["grad_norm"], tolerance)


def check_logits(logits: Tensor, golden: list[list[float]], relative: float) -> None:
    expected = torch.tensor(golden, dtype=torch.float64)
    atol = relative * expected.abs().max().item()
    torch.testing.assert_close(logits[:, :8].cpu().double(), expected, rtol=relative, atol=atol)


def check_gradients(
    norms: dict[str, float], golden: dict[str, float], tolerance: Tolerance
) -> None:
    assert norms.keys() == golden.keys()
    largest = max(golden.values())
    for key, value in golden.items():
        if value > ZERO_GRADIENT * largest:
            assert norms[key] == pytest.approx(value, rel=tolerance.gradient), key
        else:
            assert norms[key] < tolerance.zero_gradient * largest, key
