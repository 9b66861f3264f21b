"""Attention as one operator: the same network, and when it is not."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sanctl_models import build_model
from sanctl_models.fusion import VARIABLE, requested_attention, set_attention, use_attention
from sanctl_models.sam import SAM, _projected

SA_TYPES = pytest.mark.parametrize("sa_type", [0, 1], ids=["pairwise", "patchwise"])


def small_network(sa_type: int) -> nn.Module:
    torch.manual_seed(0)
    keys = {"arch": "san", "layers": [1, 1], "widths": [32, 64], "kernels": [3, 5], "classes": 3}
    network = build_model(sa_type=sa_type, **keys).double()  # type: ignore[arg-type]
    # The position's difference at the centre is 0: lest rounding decide on its side of a ReLU.
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return network


def trained(network: nn.Module, images: Tensor, mode: str) -> dict[str, Tensor]:
    """Everything that a training step finds and leaves behind."""
    with use_attention(mode):
        out = network(images)
        gradients = torch.autograd.grad(out.square().sum(), list(network.parameters()))
    names = [name for name, _ in network.named_parameters()]
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    return {"out": out.detach()} | dict(zip(names, gradients, strict=True)) | buffers


@SA_TYPES
@pytest.mark.parametrize("momentum", [0.1, None])
def test_it_trains_alike(sa_type: int, momentum: float | None) -> None:
    network = small_network(sa_type)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    other = copy.deepcopy(network)
    for seed in range(2):
        torch.manual_seed(seed)
        images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
        expected = trained(network, images, "primitives")
        actual = trained(other, images, "fused")
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-7, atol=1e-9)


@SA_TYPES
@torch.no_grad()
def test_it_evaluates_alike(sa_type: int) -> None:
    network = small_network(sa_type)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    network(images)
    network.eval()
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    with use_attention("primitives"):
        expected = network(images)
    with use_attention("fused"):
        torch.testing.assert_close(network(images), expected)
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())


@SA_TYPES
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, "SyncBatchNorm"),
        (lambda sam: setattr(sam.conv_w, "3", nn.BatchNorm2d(8, affine=False)), "BatchNorm2d"),
    ],
    ids=["synchronised", "without weights"],
)
def test_it_declines_other_normalisations(
    sa_type: int, spoil: Callable[[SAM], SAM | None], named: str
) -> None:
    sam = SAM(sa_type, 16, 8, 64, 8, 3)
    sam = spoil(sam) or sam
    x = torch.randn(2, 16, 6, 6)
    obstacle = sam.fusing_obstacle(x)
    assert obstacle is not None
    assert named in obstacle
    with use_attention("fused"), pytest.raises(ValueError, match=named):
        sam(x)


class Doubled(nn.Conv2d):
    """Stands for what users put in a convolution's place."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@SA_TYPES
@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3"])
def test_other_projections_are_called(sa_type: int, name: str) -> None:
    torch.manual_seed(0)
    sam = SAM(sa_type, 16, 8, 64, 8, 3).double()
    other = copy.deepcopy(sam)
    conv = getattr(sam, name)
    setattr(other, name, Doubled(16, conv.out_channels, 1).double())
    getattr(other, name).load_state_dict(conv.state_dict())
    with torch.no_grad():
        conv.weight *= 2
        conv.bias *= 2
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    with use_attention("fused"):
        torch.testing.assert_close(other(x), sam(x))


@SA_TYPES
def test_the_obstacle_is_judged_by_what_autocast_makes_of_the_input(sa_type: int) -> None:
    sam = SAM(sa_type, 16, 8, 64, 8, 3)
    x = torch.randn(2, 16, 6, 6)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            made = sam.conv1(x)
            stand_in = _projected(x, sam.conv1)
        assert (stand_in.dtype, stand_in.shape) == (made.dtype, made.shape)


def test_without_a_gpu_there_is_a_reason() -> None:
    sam = SAM(0, 16, 8, 64, 8, 3)
    x = torch.randn(2, 16, 6, 6)
    assert sam.fusing_obstacle(x)


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert requested_attention() == "auto"
    monkeypatch.setenv(VARIABLE, "fused")
    assert requested_attention() == "fused"
    with use_attention("auto"):
        assert requested_attention() == "auto"
        set_attention("fused")
        assert requested_attention() == "fused"
    assert requested_attention() == "fused"
    with pytest.raises(ValueError, match="attention must be one of auto, fused, primitives"):
        set_attention("fast")
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=VARIABLE):
        requested_attention()
