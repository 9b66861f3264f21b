"""The named networks: what they are called, how large they are, and what builds them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sanctl_models import build_model, create_model, list_models, model_kwargs, model_summary

# Zhao, Jia and Koltun, CVPR 2020: millions of parameters, billions of multiply-adds at 224 px.
PUBLISHED = {
    "resnet26": (13.7, 2.4),
    "san10_pairwise": (10.5, 2.2),
    "san10_patchwise": (11.8, 1.9),
    "resnet38": (19.6, 3.2),
    "san15_pairwise": (14.1, 3.0),
    "san15_patchwise": (16.2, 2.6),
    "resnet50": (25.6, 4.1),
    "san19_pairwise": (17.6, 3.8),
    "san19_patchwise": (20.5, 3.3),
}
NAMES = {
    *PUBLISHED,
    "nl",
    "hybrid_pair_2-2",
    "hybrid_patch_2-2",
    "hybrid_pair_3-1",
    "hybrid_patch_3-1",
    "hybrid_pair_2-2_nl",
    "hybrid_patch_2-2_nl",
    "hybrid_pair_3-1_nl",
    "hybrid_patch_3-1_nl",
    "hybrid_nl_2-2",
    "hybrid_nl_3-1",
    "resnet26_nl",
    "san10_pairwise_nl",
    "san10_patchwise_nl",
}
# Widths, layers and types of the networks with stages of several kinds.
HYBRIDS: dict[str, tuple[list[str], list[int], list[int], int | None]] = {
    "hybrid_pair_2-2": (["res", "res", "san", "san"], [1, 2, 4, 1], [0, 0, 0, 0], 0),
    "hybrid_patch_3-1": (["res", "res", "res", "san"], [1, 2, 4, 1], [0, 0, 0, 0], 1),
    "hybrid_patch_2-2_nl": (["res", "res", "san", "san"], [1, 1, 2, 1], [0, 1, 2, 0], 1),
    "hybrid_pair_3-1_nl": (["res", "res", "res", "san"], [1, 1, 2, 1], [0, 1, 2, 0], 0),
    "hybrid_nl_2-2": (["res", "res", "nl", "nl"], [1, 2, 4, 1], [0, 0, 0, 0], None),
    "hybrid_nl_3-1": (["res", "res", "res", "nl"], [1, 2, 4, 1], [0, 0, 0, 0], None),
    "resnet26_nl": (["res", "res", "res", "res"], [1, 1, 2, 1], [0, 1, 2, 0], None),
    "san10_pairwise_nl": (["san"] * 5, [2, 1, 1, 2, 1], [0, 0, 1, 2, 0], 0),
    "san10_patchwise_nl": (["san"] * 5, [2, 1, 1, 2, 1], [0, 0, 1, 2, 0], 1),
}


@pytest.fixture(autouse=True)
def no_memory() -> Iterator[None]:
    with torch.device("meta"):
        yield


def test_lists_every_name_once() -> None:
    assert sorted(list_models()) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_builds_by_either_way(name: str) -> None:
    by_name = create_model(name, num_classes=7, in_chans=1)
    by_keys = build_model(**model_kwargs(name), classes=7, grayscale=True)
    by_model = build_model(model=name, classes=7, grayscale=True)
    shapes = shapes_of(by_name)
    assert shapes == shapes_of(by_keys) == shapes_of(by_model)
    side = by_name.min_input_size
    features = by_name.eval().forward_features(torch.empty(2, 1, side, side))
    assert features.shape == (2, 2048)
    assert by_name(torch.empty(2, 1, side, side)).shape == (2, 7)
    assert model_summary(name)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_composed_as_published(name: str) -> None:
    types, layers, added, sa_type = HYBRIDS[name]
    keys = model_kwargs(name)
    assert (keys["layer_types"], keys["layers"]) == (types, layers)
    assert (keys["added_nl_blocks"], keys.get("sa_type")) == (added, sa_type)
    five = [64, 256, 512, 1024, 2048]
    assert keys["widths"] == (five if len(types) == 5 else five[1:])


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_cost_are_the_published_ones(name: str) -> None:
    params, multiply_adds = PUBLISHED[name]
    model = create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == params
    assert published_count(model) / 1e9 == pytest.approx(multiply_adds, abs=0.055)


class RectifiedAndPooled(TorchDispatchMode):
    """Counts outputs of ReLU and inputs of max-pools, be they modules or functions."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in {torch.ops.aten.relu.default, torch.ops.aten.relu_.default}:
            self.values += out.numel()
        elif func is torch.ops.aten.max_pool2d_with_indices.default:
            self.values += args[0].numel()
        return out


def published_count(model: nn.Module) -> int:
    """Count as the published figures do, which hold elementwise layers, too.

    Multiply-adds of convolutions, matrix products and attention operators; to these 1 for every
    output of a bias or ReLU and every input of a pool, and 2 for every output of a batch norm.
    """
    elementwise = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elementwise
        if isinstance(module, nn.BatchNorm2d):
            elementwise += 2 * output.numel()
        elif getattr(module, "bias", None) is not None:
            elementwise += output.numel()

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    others = RectifiedAndPooled()
    with FlopCounterMode(display=False) as counter, others, torch.no_grad():
        model.eval()(torch.empty(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() // 2 + elementwise + others.values


def test_the_callers_changes_do_not_reach_the_registry() -> None:
    model_kwargs("san10_pairwise")["layers"].append(9)
    assert model_kwargs("san10_pairwise")["layers"] == [2, 1, 2, 4, 1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("san10_pairwize", "did you mean san10_pairwise"), ("vgg", "use one of san10_pairwise")],
)
def test_an_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    for call in (create_model, model_kwargs, model_summary):
        with pytest.raises(ValueError, match=f"model: '{name}' is unknown; {hint}"):
            call(name)


def shapes_of(model: nn.Module) -> dict[str, Any]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}
