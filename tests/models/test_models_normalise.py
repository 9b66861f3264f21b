"""Batch normalisation with ReLU in the networks: beside nn.BatchNorm2d, buffers included."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sanctl_models.normalise import (
    normalise_relu,
    normalise_relu_by_operator,
    normalise_relu_with_skip,
    normalise_relu_with_skip_by_operator,
)
from sanctl_models.sam import SAM

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 1.0},
    {"eps": 0.1},
    {"track_running_stats": False},
]
each_device = pytest.mark.parametrize("device", DEVICES)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


class Counted(nn.BatchNorm2d):
    """A subclass may do anything; this one counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Operators(TorchDispatchMode):
    """Collects the names of the operators that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(str(operator).removesuffix(".default"))
        return operator(*args, **kwargs or {})


def two_alike(device: str, **options: Any) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    first = nn.BatchNorm2d(4, dtype=torch.float64, **options)
    nn.init.normal_(first.weight)
    nn.init.normal_(first.bias)
    if first.running_mean is not None and first.running_var is not None:
        nn.init.normal_(first.running_mean)
        nn.init.uniform_(first.running_var, 1, 2)
    first.to(device)
    return first, copy.deepcopy(first)


def images(device: str, *shape: int) -> Tensor:
    x = 3 * torch.randn(shape or (2, 4, 5, 6), dtype=torch.float64) + 1
    return x.to(device).requires_grad_()


@each_option
@each_device
def test_three_steps_by_the_operator(options: dict[str, Any], device: str) -> None:
    ours, torchs = two_alike(device, **options)
    for _ in range(3):
        x = images(device)
        out, expected = normalise_relu_by_operator(ours, x), F.relu(torchs(x))
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, [x, *ours.parameters()], grad),
            torch.autograd.grad(expected, [x, *torchs.parameters()], grad),
        )
        torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    ours.eval()
    torchs.eval()
    x = images(device)
    torch.testing.assert_close(normalise_relu(ours, x), F.relu(torchs(x)))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


@each_option
@each_device
def test_what_skips_the_rest_adds_its_gradient(options: dict[str, Any], device: str) -> None:
    ours, torchs = two_alike(device, **options)
    for normalised in (normalise_relu_with_skip_by_operator, normalise_relu_with_skip):
        planes = images(device)
        x = planes.contiguous(memory_format=torch.channels_last)
        (out, skip), expected = normalised(ours, x), F.relu(torchs(planes))
        torch.testing.assert_close((out, skip), (expected, planes))
        torch.testing.assert_close(
            torch.autograd.grad((out * skip).sum(), [planes, *ours.parameters()]),
            torch.autograd.grad((expected * planes).sum(), [planes, *torchs.parameters()]),
        )
        torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


@each_device
def test_buffers_of_16_bits(device: str) -> None:
    ours, torchs = (module.to(torch.bfloat16) for module in two_alike(device))
    # On a CPU, torch rounds scale, shift and statistics to 16 bits before it uses them.
    close: dict[str, Any] = {"rtol": 2**-6, "atol": 2**-7}
    for _ in range(3):
        x = images(device).to(torch.bfloat16)
        out, expected = normalise_relu_by_operator(ours, x), F.relu(torchs(x))
        torch.testing.assert_close(out, expected, **close)
        torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), **close)


@each_option
@each_device
def test_compiles_without_a_graph_break(options: dict[str, Any], device: str) -> None:
    torch.compiler.reset()
    ours, torchs = two_alike(device, **options)
    step = torch.compile(normalise_relu_by_operator, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = images(device)
        out, expected = step(ours, x), F.relu(torchs(x))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x)
        )
        torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


@pytest.mark.parametrize("training", [True, False])
@each_option
@each_device
def test_either_way_is_torchs(options: dict[str, Any], training: bool, device: str) -> None:
    ours, torchs = (module.train(training) for module in two_alike(device, **options))
    x = images(device)
    before = x.detach().clone()
    with Operators() as run:
        out = normalise_relu(ours, x)
    torch.testing.assert_close(out, F.relu(torchs(x)))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    assert x.equal(before)
    by_batch = training or ours.running_mean is None
    assert ("sanctl.batch_norm_relu" in run.names) == (by_batch and device == "cuda")


@pytest.mark.parametrize("training", [True, False])
@each_device
def test_channels_last_planes_stay_so(training: bool, device: str) -> None:
    torch.manual_seed(0)
    ours = nn.BatchNorm2d(8).to(device).train(training)
    torchs = copy.deepcopy(ours)
    x = images(device, 2, 8, 5, 6).float().contiguous(memory_format=torch.channels_last)
    with Operators() as run:
        out = normalise_relu(ours, x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.relu(torchs(x)))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    ran = "sanctl.batch_norm_relu_channels_last" in run.names
    assert ran == (training and device == "cuda")


@each_device
def test_other_modules_are_called(device: str) -> None:
    counted = Counted(4, dtype=torch.float64, device=device)
    plain = nn.BatchNorm2d(4, affine=False, dtype=torch.float64, device=device)
    x = images(device)
    with Operators() as run:
        torch.testing.assert_close(normalise_relu(counted, x), normalise_relu(plain, x))
    assert counted.calls == 1
    assert "sanctl.batch_norm_relu" not in run.names


@each_device
def test_one_value_per_channel_is_refused_as_torch_does(device: str) -> None:
    ours, torchs = two_alike(device)
    x = images(device, 1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel") as expected:
        torchs(x)
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        normalise_relu(ours, x)
    assert str(raised.value) == str(expected.value)


@each_device
def test_no_images_are_let_through(device: str) -> None:
    ours, torchs = two_alike(device)
    x = images(device, 0, 4, 5, 6)
    assert normalise_relu(ours, x).shape == (0, 4, 5, 6)
    torchs(x)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


@pytest.mark.parametrize("sa_type", [0, 1], ids=["pairwise", "patchwise"])
def test_attention_takes_other_normalisations(sa_type: int) -> None:
    """As nn.SyncBatchNorm.convert_sync_batchnorm and others put them in."""
    sam = SAM(sa_type, 8, 4, 8, 4, 3).double()
    expected = copy.deepcopy(sam)
    for place in ("0", "3"):
        module = sam.conv_w.get_submodule(place)
        assert isinstance(module, nn.BatchNorm2d)
        counted = Counted(module.num_features, dtype=torch.float64)
        sam.conv_w.add_module(place, counted)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(sam(x), expected(x))
    assert [m.calls for m in sam.modules() if isinstance(m, Counted)] == [1, 1]
