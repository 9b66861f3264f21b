"""Self-attention: against its definition pixel by pixel, its symmetries, layouts and compiler."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_models import Network, build_model
from sanctl_models.sam import SAM, position_map

SA_TYPES = pytest.mark.parametrize("sa_type", [0, 1], ids=["pairwise", "patchwise"])
TINY: dict[str, Any] = {
    "arch": "san",
    "layers": [1, 1],
    "widths": [32, 64],
    "kernels": [3, 5],
    "classes": 3,
}


def mirrored(index: int, side: int) -> int:
    """Index of the pixel that lies at `index` of a plane mirrored without repeating its border."""
    index = abs(index)
    return min(index, 2 * (side - 1) - index)


def sam_by_pixels(sam: SAM, x: Tensor) -> Tensor:
    """Evaluate the definition in evaluation mode, one pixel and tap at a time."""
    batch, _, height, width = x.shape
    query, key, value = sam.conv1(x), sam.conv2(x), sam.conv3(x)
    radius = sam.kernel_size // 2
    offsets = list(itertools.product(range(-radius, radius + 1), repeat=2))
    out = torch.empty_like(value)
    for i, j in itertools.product(range(height), range(width)):
        taps = [(mirrored(i + di, height), mirrored(j + dj, width)) for di, dj in offsets]
        if sam.sa_type == 0:
            relation = pairwise_relation(sam, query, key, (i, j), taps)
            weights = sam.conv_w(relation).softmax(2)[..., 0]
        else:
            # Channel-major, with the taps of a channel beside one another.
            patch = torch.stack([key[:, :, r, c] for r, c in taps], 2).flatten(1)
            relation = torch.cat((query[:, :, i, j], patch), 1)[..., None, None]
            weights = sam.conv_w(relation).view(batch, -1, len(taps))
        for channel in range(value.shape[1]):
            shared = weights[:, channel % weights.shape[1]]
            values = torch.stack([value[:, channel, r, c] for r, c in taps], 1)
            out[:, channel, i, j] = (shared * values).sum(1)
    return out


def pairwise_relation(
    sam: SAM, query: Tensor, key: Tensor, pixel: tuple[int, int], taps: list[tuple[int, int]]
) -> Tensor:
    height, width = query.shape[2:]

    def place(row: int, column: int) -> Tensor:
        across, down = 2 * column / (width - 1) - 1, 2 * row / (height - 1) - 1
        position = torch.tensor([across, down], dtype=query.dtype)
        return sam.conv_p(position.view(1, 2, 1, 1)).flatten().expand(query.shape[0], 2)

    here = torch.cat((query[:, :, pixel[0], pixel[1]], place(*pixel)), 1)
    there = [torch.cat((key[:, :, r, c], place(r, c)), 1) for r, c in taps]
    return torch.stack([here - tap for tap in there], 2)[..., None]


@SA_TYPES
@pytest.mark.parametrize("kernel_size", [1, 3])
@torch.no_grad()
def test_agrees_with_the_definition(sa_type: int, kernel_size: int) -> None:
    torch.manual_seed(0)
    sam = SAM(sa_type, 6, 3, 8, 4, kernel_size).double().eval()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(sam(x), sam_by_pixels(sam, x))


def test_position_map_runs_along_width_then_height() -> None:
    x = torch.zeros(7, 5, 3, 5)
    grid = position_map(x)
    assert grid.shape == (1, 2, 3, 5)
    torch.testing.assert_close(grid[0, 0, 2], torch.tensor([-1, -0.5, 0, 0.5, 1]))
    torch.testing.assert_close(grid[0, 1, :, 4], torch.tensor([-1.0, 0, 1]))
    assert position_map(x[..., :1, :1]).flatten().tolist() == [-1, -1]


def test_gradients_that_cancel_are_zero_and_the_others_are_not() -> None:
    torch.manual_seed(0)
    sam = SAM(0, 16, 4, 16, 8, 3).double()
    out = sam(torch.randn(2, 16, 6, 6, dtype=torch.float64))
    (out * torch.randn_like(out)).sum().backward()
    norms = {k: p.grad.norm().item() for k, p in sam.named_parameters() if p.grad is not None}
    # A difference cancels the position's bias, and softmax a bias that all taps share; query and
    # key biases are shifts before a batch norm.
    zero = {"conv_p.bias", "conv_w.5.bias", "conv1.bias", "conv2.bias"}
    for key, norm in norms.items():
        assert (norm < 1e-12) == (key in zero), (key, norm)


@SA_TYPES
def test_constant_images_and_saturated_softmax_stay_finite(sa_type: int) -> None:
    model = build_model(**TINY, sa_type=sa_type)
    for images in (torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 1e4)):
        model.zero_grad()
        model(images).sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all(), key


@SA_TYPES
def test_channels_last_gives_the_same(sa_type: int) -> None:
    torch.manual_seed(0)
    model = tiny_in_general_position(sa_type)
    images = torch.randn(2, 3, 20, 16, dtype=torch.float64)
    expected, expected_grads = step(model, images)
    model.to(memory_format=torch.channels_last)
    logits, grads = step(model, images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-7, atol=1e-10)


@SA_TYPES
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(sa_type: int, training: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = tiny_in_general_position(sa_type).train(training)
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    # The traced graphs, forward and backward, run without the minutes of generating code.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, grads = step(compiled, images)
    expected, expected_grads = step(model, images)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-7, atol=1e-10)


@SA_TYPES
def test_autocast_trains(sa_type: int) -> None:
    model = build_model(**TINY, sa_type=sa_type)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, 16, 16))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def tiny_in_general_position(sa_type: int) -> Network:
    """Return a float64 network without zero biases.

    Position differences are exactly zero in a third of the taps. With a zero bias, rounding alone
    would decide on which side of the ReLU they come to lie.
    """
    model = build_model(**TINY, sa_type=sa_type).double()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model: Any, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients; gradients of the step before are dropped."""
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    named = getattr(model, "_orig_mod", model).named_parameters()
    return logits.detach(), {key: p.grad.clone() for key, p in named if p.grad is not None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "keys",
    [
        TINY | {"sa_type": 0},
        TINY | {"sa_type": 1},
        {"arch": "resnet", "layers": [1, 1, 1, 1], "classes": 3},
        {"arch": "nl", "layers": [1, 1, 1, 1], "classes": 3},
    ],
    ids=["pairwise", "patchwise", "resnet", "nl"],
)
def test_deterministic_algorithms_suffice_on_cuda(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = build_model(**keys).cuda().eval()
    images = torch.randn(2, 3, 64, 64, device="cuda", requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(model(images).square().sum(), [images, *model.parameters()])
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
