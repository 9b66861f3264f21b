"""Normalising and pooling between stages: beside torch's modules, and when those are called."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sanctl_ops
from sanctl_models import build_model
from sanctl_models.pooling import (
    convolve_normalise_pool,
    convolve_normalise_pool_by_operator,
    normalise_pool,
    normalise_pool_by_operator,
)
from sanctl_ops import Choice

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]
each_device = pytest.mark.parametrize("device", DEVICES)
each_option = pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"eps": 0.1}, {"track_running_stats": False}], ids=str
)
Layers = tuple[nn.Conv2d, nn.BatchNorm2d]


class Operators(TorchDispatchMode):
    """Collects the names of the operators of this project that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(operator).startswith("sanctl."):
            self.names.append(str(operator).removesuffix(".default"))
        return operator(*args, **kwargs or {})


def layers(device: str, dtype: torch.dtype = torch.float64, **options: Any) -> Layers:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 1, bias=False, device=device, dtype=dtype)
    batch_norm = nn.BatchNorm2d(8, device=device, dtype=dtype, **options)
    nn.init.normal_(batch_norm.weight)
    nn.init.normal_(batch_norm.bias)
    return conv, batch_norm


def drawn(device: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = 3 * torch.randn(shape, dtype=torch.float64) + 1
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def by_torch(conv: nn.Module, batch_norm: nn.Module, images: Tensor) -> Tensor:
    return F.relu(F.max_pool2d(batch_norm(conv(images)), 2))


@each_option
@each_device
def test_three_steps_by_the_operators(options: dict[str, Any], device: str) -> None:
    ours = layers(device, **options)
    torchs = copy.deepcopy(ours)
    modules = nn.ModuleList(ours), nn.ModuleList(torchs)
    for _ in range(3):
        images = drawn(device, 2, 3, 5, 6)
        out, expected = (
            convolve_normalise_pool_by_operator(*ours, images),
            by_torch(*torchs, images),
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), list(modules[0].parameters())),
            torch.autograd.grad(expected.square().sum(), list(modules[1].parameters())),
        )
        x = drawn(device, 2, 8, 7, 4).requires_grad_()
        out, expected = (
            normalise_pool_by_operator(ours[1], x),
            by_torch(nn.Identity(), torchs[1], x),
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), [x, *ours[1].parameters()]),
            torch.autograd.grad(expected.square().sum(), [x, *torchs[1].parameters()]),
        )
        torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())
    modules[0].eval()
    modules[1].eval()
    torch.testing.assert_close(
        convolve_normalise_pool_by_operator(*ours, images), by_torch(*torchs, images)
    )
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


@pytest.mark.parametrize("training", [True, False])
@each_device
def test_either_way_is_torchs(training: bool, device: str) -> None:
    conv, batch_norm = layers(device, torch.float32)
    batch_norm.train(training)
    expected_norm = copy.deepcopy(batch_norm)
    images = drawn(device, 2, 3, 6, 6, dtype=torch.float32)
    with Operators() as run, torch.no_grad():
        out = convolve_normalise_pool(conv, batch_norm, images)
        out = normalise_pool(batch_norm, out)
        expected = by_torch(conv, expected_norm, images)
        expected = by_torch(nn.Identity(), expected_norm, expected)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(batch_norm.state_dict(), expected_norm.state_dict())
    assert run.names == (["sanctl.conv_norm_pool", "sanctl.norm_pool"] if device == "cuda" else [])


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of no substance on a GPU that there need not be, whose kernels are said to run."""
    for name in ("norm_pool", "conv_norm_pool"):
        module = __import__(f"sanctl_ops.{name}", fromlist=[name])
        monkeypatch.setattr(module, "choose_backend", lambda device: Choice("cupy", ""))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def names_of(run: Callable[[], Tensor]) -> list[str]:
    with Operators() as operators:
        run()
    return operators.names


STEM, TRANSITION = "sanctl.conv_norm_pool", "sanctl.norm_pool"


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("training", [True, False])
def test_the_operators_serve_plain_modules(training: bool) -> None:
    conv, batch_norm = layers("cuda", torch.float32)
    batch_norm.train(training)
    images = drawn("cuda", 2, 3, 6, 7, dtype=torch.float32)
    assert names_of(lambda: convolve_normalise_pool(conv, batch_norm, images)) == [STEM]
    out = convolve_normalise_pool(conv, batch_norm, images)
    assert (out.dtype, out.shape) == (torch.float32, (2, 8, 3, 3))
    assert names_of(lambda: normalise_pool(batch_norm, out)) == [TRANSITION]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_images_are_rounded_as_autocast_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.autocast does nothing for GPUs where there is none.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    conv, batch_norm = layers("cuda", torch.float32)
    images = drawn("cuda", 2, 3, 6, 7, dtype=torch.float32)
    assert convolve_normalise_pool(conv, batch_norm, images).dtype == torch.bfloat16


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda conv, norm, x: (conv, norm, x.requires_grad_()), [TRANSITION]),
        (lambda conv, norm, x: (nn.Conv2d(3, 8, 1, device="cuda"), norm, x), [TRANSITION]),
        (lambda conv, norm, x: (nn.Conv2d(3, 8, 1, 2, device="cuda"), norm, x), [TRANSITION]),
        (lambda conv, norm, x: (hooked(conv), norm, x), [TRANSITION]),
        (lambda conv, norm, x: (conv, hooked(norm), x), []),
        (lambda conv, norm, x: (conv, nn.BatchNorm2d(8, affine=False, device="cuda"), x), []),
        (lambda conv, norm, x: (conv, nn.InstanceNorm2d(8), x), []),
        (lambda conv, norm, x: (conv, norm, x[:0]), []),
    ],
    ids=["gradient", "bias", "stride", "hook", "norm's hook", "not affine", "other", "no images"],
)
def test_other_modules_are_called(spoil: Callable[..., Any], expected: list[str]) -> None:
    conv, batch_norm = layers("cuda", torch.float32)
    images = drawn("cuda", 2, 3, 8, 8, dtype=torch.float32)
    spoilt = spoil(conv, batch_norm, images)
    assert names_of(lambda: convolve_normalise_pool(*spoilt)) == expected


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.usefixtures("as_on_a_gpu")
def test_other_layouts_are_left_to_torch() -> None:
    conv, batch_norm = layers("cuda", torch.float32)
    images = drawn("cuda", 2, 3, 8, 8, dtype=torch.float32).contiguous()
    assert names_of(lambda: convolve_normalise_pool(conv, batch_norm, images)) == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_network_pools_by_the_operators() -> None:
    keys: dict[str, Any] = {"layers": [1, 1, 1], "widths": [32, 64, 64], "kernels": [3, 3, 3]}
    with torch.device("cuda"):
        network = build_model(arch="san", sa_type=1, classes=3, **keys)
    images = drawn("cuda", 2, 3, 32, 32, dtype=torch.float32)
    with sanctl_ops.use_backend("torch"):
        names = names_of(lambda: network(images))
    assert [n for n in names if n in {STEM, TRANSITION}] == [STEM, TRANSITION, TRANSITION]


@each_device
def test_compiles_without_a_graph_break(device: str) -> None:
    torch.compiler.reset()
    conv, batch_norm = layers(device, torch.float32)
    expected_norm = copy.deepcopy(batch_norm)

    def run(images: Tensor) -> Tensor:
        return normalise_pool(batch_norm, convolve_normalise_pool(conv, batch_norm, images))

    step = torch.compile(run, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 4):
        images = drawn(device, batch, 3, 8, 8, dtype=torch.float32)
        out = step(images)
        expected = by_torch(conv, expected_norm, images)
        expected = by_torch(nn.Identity(), expected_norm, expected)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(batch_norm.state_dict(), expected_norm.state_dict())


@pytest.mark.gpu
@on_gpu
def test_a_network_trains_as_by_torch() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    network = build_model(model="san10_patchwise", classes=10).cuda()
    network.to(memory_format=torch.channels_last)
    other = copy.deepcopy(network).double()
    images = drawn("cuda", 8, 3, 128, 128, dtype=torch.float32)
    with Operators() as run:
        out = network(images)
    assert {STEM, TRANSITION} <= set(run.names)
    with sanctl_ops.use_backend("torch"):
        expected = other(images.double())
    assert F.cosine_similarity(out.double().flatten(), expected.flatten(), 0) > 0.999
    for buffer, wanted in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), wanted.double(), rtol=1e-2, atol=1e-3)
