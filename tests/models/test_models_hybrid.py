"""The order of blocks, transitions and strides in hybrid networks."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from sanctl_models import build_model
from sanctl_models.nonlocal_block import NonLocalBlock
from sanctl_models.san import SANBottleneck
from sanctl_models.transition import Transition

LETTERS: dict[type[nn.Module], str] = {
    Bottleneck: "r",
    SANBottleneck: "s",
    NonLocalBlock: "n",
    Transition: "T",
    nn.BatchNorm2d: "b",
    nn.ReLU: "a",
}


def hybrid(types: list[str], blocks: list[int], added: list[int] | None = None) -> nn.Module:
    keys: dict[str, Any] = {"added_nl_blocks": added, "sa_type": 1, "classes": 3}
    widths = [32] * len(types)
    return build_model(arch="hybrid", layer_types=types, layers=blocks, widths=widths, **keys)


def spell(module: nn.Module) -> str:
    """Spell a module in letters, a plain Sequential in parentheses."""
    if type(module) is nn.Sequential:
        return f"({''.join(spell(child) for child in module)})"
    return LETTERS[type(module)]


def backbone(*args: Any) -> str:
    module = hybrid(*args).get_submodule("backbone")
    return spell(module)[1:-1]


@pytest.mark.parametrize(
    ("blocks", "added", "expected"),
    [
        (6, 0, "rrrrrr"),
        (6, 1, "rrrrrnr"),
        (6, 2, "rrrnrrnr"),
        (6, 3, "rnrrnrrnr"),
        (6, 4, "rrnrnrnrnr"),
        (6, 5, "rnrnrnrnrnr"),
        (6, 6, "Tnrnrnrnrnrnr"),
        (1, 1, "Tnr"),
        (2, 1, "rnr"),
        (3, 2, "rnrnr"),
    ],
)
def test_non_local_blocks_between_residual_blocks(blocks: int, added: int, expected: str) -> None:
    assert backbone(["res", "res"], [1, blocks], [0, added]) == f"(r)({expected})"


@pytest.mark.parametrize(
    ("blocks", "added", "expected"),
    [
        (6, 0, "ssssss"),
        (6, 2, "sssnssns"),
        (6, 3, "snssnssns"),
        (6, 4, "ssnsnsnsns"),
        (6, 6, "nsnsnsnsnsns"),
        (1, 1, "ns"),
        (2, 1, "sns"),
    ],
)
def test_non_local_blocks_between_attention_blocks(blocks: int, added: int, expected: str) -> None:
    # A last stage of self-attention is followed by batch norm and ReLU.
    assert backbone(["san"], [blocks], [added]) == f"T({expected})ba"


def test_stages_lie_flat_in_the_backbone() -> None:
    assert backbone(["res", "san", "nl"], [2, 1, 2]) == "(rr)T(s)T(banban)ba"
    assert backbone(["san", "nl", "res"], [1, 1, 2]) == "T(s)T(ban)(rr)"


def test_stem_follows_the_first_stage() -> None:
    assert hybrid(["san"], [1]).state_dict()["stem.weight"].shape == (64, 3, 1, 1)
    residual = hybrid(["res"], [1]).state_dict()
    assert residual["stem.0.weight"].shape == (64, 3, 7, 7)
    assert residual["stem.1.weight"].shape == (64,)


@pytest.mark.parametrize(
    ("types", "added", "side"),
    [
        # The residual stem leaves 1/4, its first stage keeps that, each other stage halves it.
        (["res"], [0], 16),
        (["res", "res"], [0, 0], 8),
        (["res", "res"], [0, 1], 8),
        (["res", "res"], [1, 0], 4),
        (["san"], [0], 32),
        (["san", "res", "nl"], [0, 0, 0], 8),
    ],
)
def test_resolution(types: list[str], added: list[int], side: int) -> None:
    model = hybrid(types, [1] * len(types), added).eval()
    maps = model.get_submodule("backbone")(model.get_submodule("stem")(torch.randn(1, 3, 64, 64)))
    assert maps.shape == (1, 32, side, side)


def test_windows_are_3_in_the_first_stage_and_7_in_the_others() -> None:
    model = hybrid(["san", "san", "res", "san"], [1, 1, 1, 1])
    kernels = [m.sam.kernel_size for m in model.modules() if isinstance(m, SANBottleneck)]
    assert kernels == [3, 7, 7]


def test_shortcuts_project_only_where_the_shape_changes() -> None:
    model = build_model(
        arch="hybrid", layer_types=["res", "res"], layers=[2, 2], widths=[64, 64], classes=3
    )
    keys = {key.split(".downsample")[0] for key in model.state_dict() if "downsample" in key}
    assert keys == {"backbone.1.0"}
