"""The smallest input of each network, and what is said to smaller ones."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from sanctl_models import Network, build_model, create_model, list_models, min_input_size

SIDES = {
    "san10_pairwise": 128,
    "san19_patchwise": 128,
    "san10_patchwise_nl": 128,
    "resnet50": 1,
}
SAN: dict[str, Any] = {"arch": "san", "layers": [1, 1], "widths": [32, 32]}
SMALL: list[dict[str, Any]] = [
    SAN | {"sa_type": 0, "kernels": [7, 3]},
    SAN | {"sa_type": 1, "kernels": [3, 5]},
    SAN | {"sa_type": 1, "kernels": [1, 1]},
    {"arch": "resnet", "layers": [1, 1, 1, 1]},
    {"arch": "nl", "layers": [1, 1, 1, 1]},
    *(
        {
            "arch": "hybrid",
            "sa_type": 1,
            "layers": [1] * len(types),
            "layer_types": types,
            "widths": [32] * len(types),
            "added_nl_blocks": added,
        }
        for types, added in [
            (["res", "san"], [0, 0]),
            (["res", "res", "san"], [1, 0, 0]),
            (["san", "san"], [0, 1]),
            (["san", "res"], [0, 0]),
            (["san", "res", "nl"], [1, 1, 0]),
            (["res", "res"], [0, 1]),
            (["res"], [0]),
        ]
    ),
]


@pytest.mark.parametrize("name", SIDES)
def test_known_smallest_sides(name: str) -> None:
    with torch.device("meta"):
        assert min_input_size(create_model(name)) == SIDES[name]


@pytest.mark.parametrize("keys", SMALL, ids=str)
def test_the_smallest_side_is_the_smallest_that_the_layers_can_work_on(
    keys: dict[str, Any],
) -> None:
    model = build_model(**keys, classes=3, grayscale=True).eval()
    smallest = min_input_size(model)
    for height, width in ((smallest, smallest), (smallest + 1, smallest + 2)):
        logits = model(torch.randn(2, 1, height, width))
        assert logits.shape == (2, 3)
        assert logits.isfinite().all()
    if smallest > 1:
        check_smaller_is_refused(model, smallest)
        with pytest.raises((RuntimeError, ValueError)):
            model.feature_maps(torch.randn(2, 1, smallest - 1, smallest))


def check_smaller_is_refused(model: Network, smallest: int) -> None:
    message = (
        f"input of {smallest} x {smallest - 1} px is too small: this network needs at least "
        f"{smallest} x {smallest} px"
    )
    for call in (model, model.forward_features):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(torch.randn(2, 1, smallest, smallest - 1))


@pytest.mark.parametrize("name", list_models())
def test_every_named_network_accepts_its_smallest_input_only(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, in_chans=1).eval()
        side = min_input_size(model)
        model(torch.empty(1, 1, side, side))
        if side > 1:
            with pytest.raises(ValueError, match="use larger images, or a network with smaller"):
                model(torch.empty(1, 1, side - 1, side))


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 64, 64)])
def test_other_channels_or_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    model = create_model("resnet26", in_chans=1)
    with pytest.raises(ValueError, match=re.escape(f"input of shape {shape}: this network takes")):
        model(torch.zeros(shape))


def test_min_input_size_refuses_other_modules() -> None:
    with pytest.raises(ValueError, match="Linear is not a network of sanctl_models"):
        min_input_size(nn.Linear(1, 1))
