"""Self-attention on a GPU: against the CPU in float64, in lower precision, and compiled."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_models import build_model
from sanctl_models.fusion import use_attention
from sanctl_models.sam import SAM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SA_TYPES = pytest.mark.parametrize("sa_type", [0, 1], ids=["pairwise", "patchwise"])
MODES = pytest.mark.parametrize("mode", ["primitives", "auto"])
# What results are off by, as a share of their norm: twice what the CPU's own are off by against
# float64, most of it from values that rounding puts on the other side of a ReLU. An error in a
# formula is of the order of 1.
SHARES = {torch.float64: 1e-9, torch.float32: 2e-2, torch.bfloat16: 0.25, torch.float16: 0.1}
# Other gradients are sums that cancel, which 16 bits leave little of.
LARGE = ("output", "images", "conv1.weight", "conv3.weight", "conv_w.2.weight")


@pytest.fixture(autouse=True)
def _exact_convolutions() -> None:
    """Without the 10 bits of TF32, which torch allows for convolutions only."""
    torch.backends.cudnn.allow_tf32 = False


def in_general_position(model: nn.Module) -> nn.Module:
    """Draw the biases, lest rounding alone decide on which side of a ReLU a difference lies."""
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model: Any, images: Tensor, slopes: Tensor) -> dict[str, Tensor]:
    """Return output, gradients and buffers, on the CPU in float64."""
    images = images.detach().requires_grad_()
    model.zero_grad()
    out = model(images)
    (out * slopes).sum().backward()
    original = getattr(model, "_orig_mod", model)
    results = {"output": out, "images": images.grad, **dict(original.named_buffers())}
    results |= {key: parameter.grad for key, parameter in original.named_parameters()}
    return {key: value.detach().cpu().double() for key, value in results.items()}


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    assert actual.keys() == expected.keys()
    gradients = [v.norm().item() for k, v in expected.items() if k.endswith(("weight", "bias"))]
    for key, value in expected.items():
        # Some gradients are zero but for rounding.
        size = max(value.norm().item(), 1e-3 * max(gradients))
        assert (actual[key] - value).norm().item() <= share * size, key


@MODES
@SA_TYPES
@pytest.mark.parametrize("dtype", SHARES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("kernel_size", "height", "width"), [(3, 24, 20), (7, 9, 7), (7, 16, 28), (7, 56, 56)]
)
def test_attention_agrees_with_the_cpu(
    mode: str,
    sa_type: int,
    dtype: torch.dtype,
    training: bool,
    layout: torch.memory_format,
    kernel_size: int,
    height: int,
    width: int,
) -> None:
    torch.manual_seed(0)
    sam = in_general_position(SAM(sa_type, 32, 4, 16, 8, kernel_size)).train(training)
    # Of one value in all types, so that only arithmetic is compared.
    sam.to(dtype)
    images = torch.randn(3, 32, height, width).to(dtype)
    slopes = torch.randn(3, 16, height, width).to(dtype)
    expected = step(copy.deepcopy(sam).double(), images.double(), slopes.double())
    sam.cuda().to(memory_format=layout)
    on_gpu = images.cuda().contiguous(memory_format=layout)
    with use_attention(mode):
        actual = step(sam, on_gpu, slopes.cuda())
    if dtype.itemsize == 2:
        actual, expected = ({key: results[key] for key in LARGE} for results in (actual, expected))
    assert_alike(actual, expected, SHARES[dtype])


@MODES
@SA_TYPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(mode: str, sa_type: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sam = SAM(sa_type, 32, 4, 16, 8, 7).cuda()
    in_general_position(sam)
    images = torch.randn(2, 32, 14, 14, device="cuda")
    expected = F.normalize(sam(images).flatten(), dim=0)
    with torch.autocast("cuda", dtype), use_attention(mode):
        assert sam.fusing_obstacle(images) is None
        out = sam(images)
    assert out.dtype == dtype
    assert F.normalize(out.float().flatten(), dim=0) @ expected > 0.99
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sam.parameters())


@pytest.mark.parametrize("name", ["san10_pairwise", "san10_patchwise"])
def test_a_network_compiles_without_a_graph_break(name: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    eager = in_general_position(build_model(model=name, classes=10)).double().cuda()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64, device="cuda")
    slopes = torch.randn(2, 10, dtype=torch.float64, device="cuda")
    for _ in range(2):
        actual, expected = step(compiled, images, slopes), step(eager, images, slopes)
        assert_alike(actual, expected, 1e-6)


@SA_TYPES
def test_a_fused_network_compiles_without_a_graph_break(sa_type: int) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    exact = build_model(
        arch="san",
        sa_type=sa_type,
        layers=[1, 1, 1],
        kernels=[3, 7, 7],
        widths=[64, 128, 256],
        classes=10,
    ).double()
    eager = copy.deepcopy(in_general_position(exact)).float().cuda()
    eager.to(memory_format=torch.channels_last)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    slopes = torch.randn(4, 10)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    for count in (4, 4, 3):
        x, y = images[:count], slopes[:count]
        expected = step(exact, x.double(), y.double())
        x, y = x.cuda(), y.cuda()
        with torch.autocast("cuda", torch.bfloat16), use_attention("auto"):
            actual, rounded = step(compiled, x, y), step(eager, x, y)
        kept = ("output", "fc.weight")
        one, other = ({key: results[key] for key in kept} for results in (actual, rounded))
        assert_alike(one, other, SHARES[torch.bfloat16])
        for key in ("output", "images", "fc.weight", "conv0.weight", "bn2.weight"):
            assert distance(actual[key], expected[key]) < 2 * distance(rounded[key], expected[key])


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
