"""Networks from YAML keys, and what each wrong key is answered."""

import re
from typing import Any

import pytest
import torch

from sanctl_models import build_model, create_model

SAN: dict[str, Any] = {
    "arch": "san",
    "sa_type": 0,
    "layers": [1, 1],
    "widths": [32, 64],
    "kernels": [3, 3],
}
HYBRID: dict[str, Any] = {
    "arch": "hybrid",
    "sa_type": 1,
    "layers": [1, 2],
    "layer_types": ["res", "san"],
    "widths": [32, 64],
}
RESNET: dict[str, Any] = {"arch": "resnet", "layers": [1, 1, 1, 1]}

WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (SAN, {"arch": None}, "arch: missing; give one of san, resnet, nl, hybrid, or a model"),
    (SAN, {"arch": "vit"}, "arch: 'vit' is unknown; use one of san, resnet, nl, hybrid"),
    (SAN, {"sa_type": None}, "sa_type: missing, but arch 'san' needs it; add it"),
    (SAN, {"sa_type": 2}, "sa_type: 2 is unknown; use one of 0, 1"),
    (SAN, {"sa_type": True}, "sa_type: True is unknown; use one of 0, 1"),
    (SAN, {"layers": None}, "layers: missing, but arch 'san' needs it; add it"),
    (SAN, {"layers": 3}, "layers: 3 is not a list of integers, one per stage"),
    (SAN, {"layers": []}, "layers: [] is not a list of integers, one per stage"),
    (SAN, {"layers": [1, 0]}, "layers[1]: 0 is not an integer of 1 or more"),
    (SAN, {"layers": [1, "x"]}, "layers[1]: 'x' is not an integer of 1 or more"),
    (
        SAN,
        {"layers": [1, 1, 1]},
        "lists of different lengths: layers has 3, widths has 2, kernels has 2; "
        "give each one entry per stage",
    ),
    (
        SAN,
        {"widths": [32, 100]},
        "widths[1]: 100 is not divisible by 32, as self-attention needs; use 96 or 128",
    ),
    (
        SAN,
        {"widths": [16, 64]},
        "widths[0]: 16 is not divisible by 32, as self-attention needs; use 32",
    ),
    (
        SAN,
        {"kernels": [3, 4]},
        "kernels[1]: 4 is even, but a window needs a centre pixel; use 3 or 5",
    ),
    (
        SAN,
        {"layer_types": ["san", "san"]},
        "layer_types: ['san', 'san'] is no key of arch 'san', which takes layers, sa_type, widths, "
        "kernels; remove it",
    ),
    (SAN, {"classes": 0}, "classes: 0 is not an integer of 1 or more"),
    (
        RESNET,
        {"layers": [1, 1, 1]},
        "layers: [1, 1, 1] has 3 entries, but this arch has 4 stages; give 4",
    ),
    (RESNET, {"sa_type": 0}, "sa_type: 0 is no key of arch 'resnet', which takes layers; remove"),
    (
        RESNET | {"arch": "nl"},
        {"layers": [1] * 5},
        "layers: [1, 1, 1, 1, 1] has 5 entries, but this arch has 4 stages; give 4",
    ),
    (HYBRID, {"layer_types": None}, "layer_types: missing, but arch 'hybrid' needs it; add it"),
    (HYBRID, {"widths": None}, "widths: missing, but arch 'hybrid' needs it; add it"),
    (HYBRID, {"sa_type": None}, "sa_type: missing, but a stage of type 'san' needs it; use 0 or 1"),
    (
        HYBRID,
        {"kernels": [3, 7]},
        "kernels: [3, 7] is no key of arch 'hybrid', which takes layers, layer_types, widths, "
        "sa_type, added_nl_blocks; remove it",
    ),
    (
        HYBRID,
        {"layer_types": ["res", "cnn"]},
        "layer_types[1]: 'cnn' is unknown; use one of res, san, nl",
    ),
    (HYBRID, {"layer_types": "san"}, "layer_types: 'san' is not a list of stage types, one per"),
    (
        HYBRID,
        {"layer_types": ["nl", "san"]},
        "layer_types[0]: 'nl' has no stem of its own; use 'res' or 'san' first",
    ),
    (
        HYBRID,
        {"added_nl_blocks": [0]},
        "lists of different lengths: layers has 2, layer_types has 2, widths has 2, "
        "added_nl_blocks has 1; give each one entry per stage",
    ),
    (
        HYBRID,
        {"added_nl_blocks": [2, 0]},
        "added_nl_blocks[0]: 2 is too many beside 1 blocks of type 'res'; use 0 to 1",
    ),
    (
        HYBRID,
        {"layer_types": ["res", "nl"], "added_nl_blocks": [0, 1]},
        "added_nl_blocks[1]: 1 is too many beside 2 blocks of type 'nl'; use 0",
    ),
    (
        HYBRID,
        {"widths": [30, 64]},
        "widths[0]: 30 is not divisible by 4, as a stage of type 'res' needs; use 28 or 32",
    ),
    (
        HYBRID,
        {"widths": [36, 64], "added_nl_blocks": [1, 0]},
        "widths[0]: 36 is not divisible by 8, as a stage of type 'res' with non-local blocks "
        "needs; use 32 or 40",
    ),
    (
        HYBRID,
        {"widths": [32, 80]},
        "widths[1]: 80 is not divisible by 32, as a stage of type 'san' needs; use 64 or 96",
    ),
    (
        {"model": "resnet26"},
        {"arch": "san"},
        "arch: 'san' contradicts model: 'resnet26', whose arch is 'resnet'; leave one of them out",
    ),
    (
        {"model": "san10_pairwise"},
        {"kernels": [3, 3]},
        "lists of different lengths: layers has 5, widths has 5, kernels has 2; "
        "give each one entry per stage",
    ),
]


@pytest.mark.parametrize(("base", "change", "message"), WRONG)
def test_a_wrong_key_is_named_with_its_value_and_the_mend(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    build_model(**{"classes": 3} | base)
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(**{"classes": 3} | base | change)


def test_explicit_keys_come_before_the_named_models() -> None:
    model = build_model(model="san10_pairwise", classes=3, sa_type=1, layers=[1] * 5)
    assert "layer3.1.conv.weight" not in model.state_dict()
    assert model.state_dict()["layer0.0.sam.conv_w.0.weight"].shape == (4 * (9 + 1),)


def test_create_model_takes_overrides() -> None:
    model = create_model("san10_pairwise", num_classes=3, widths=[32] * 5, kernels=[3] * 5)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    with pytest.raises(ValueError, match="depth: 3 is no key of arch 'san'"):
        create_model("san10_pairwise", depth=3)


@pytest.mark.parametrize("in_chans", [0, -1, 1.5])
def test_in_chans_is_a_positive_number(in_chans: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"in_chans: {in_chans} is not an integer")):
        create_model("resnet26", in_chans=in_chans)


def test_san_has_published_widths_and_kernels_by_default() -> None:
    with torch.device("meta"):
        model = build_model(arch="san", sa_type=1, layers=[2, 1, 2, 4, 1], classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 11_841_124


def test_convolutions_start_kaiming_normal_and_batch_norms_as_the_identity() -> None:
    torch.manual_seed(0)
    state = create_model("resnet26").state_dict()
    weight = state["layer4.0.conv2.weight"]
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert abs(weight.mean().item()) < 1e-4
    for key, value in state.items():
        if ".bn" in key and key.endswith((".weight", ".bias")):
            assert (value == (1 if key.endswith("weight") else 0)).all(), key
