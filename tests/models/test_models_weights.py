"""Strict loading, and the one line that says what does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sanctl_models import build_model, create_model, load_state, strip_module_prefix

KEYS: dict[str, Any] = {
    "arch": "san",
    "sa_type": 0,
    "layers": [1, 1],
    "widths": [32, 64],
    "kernels": [3, 3],
}


def small(classes: int = 5, **changes: Any) -> torch.nn.Module:
    return build_model(classes=classes, **KEYS | changes)


def differing(model: torch.nn.Module, state: dict[str, Tensor]) -> set[str]:
    return {key for key, value in model.state_dict().items() if not value.equal(state[key])}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_loads_with_and_without_prefix(prefix: str) -> None:
    saved, model = small(), small()
    state = saved.state_dict()
    assert differing(model, state)
    load_state(model, {prefix + key: value for key, value in state.items()})
    assert not differing(model, state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_leaves_the_head_out_on_demand(prefix: str) -> None:
    saved, model = small(classes=9), small(classes=5)
    head = model.state_dict()["fc.weight"].clone()
    load_state(model, {prefix + k: v for k, v in saved.state_dict().items()}, head=False)
    assert model.state_dict()["fc.weight"].equal(head)
    state = saved.state_dict() | {key: model.state_dict()[key] for key in ("fc.weight", "fc.bias")}
    assert not differing(model, state)


def test_without_head_the_weights_need_none() -> None:
    saved, model = small(), small()
    state = {k: v for k, v in saved.state_dict().items() if not k.startswith("fc.")}
    load_state(model, state, head=False)
    assert differing(model, saved.state_dict()) == {"fc.weight", "fc.bias"}


def refuse(model: torch.nn.Module, state: dict[str, Any], **options: bool) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^the weights do not fit this network: ") as caught:
        load_state(model, state, **options)
    assert not differing(model, before), "nothing may be loaded when something does not fit"
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_another_number_of_classes_is_told_apart() -> None:
    message = refuse(small(classes=5), small(classes=9).state_dict())
    assert "2 of another shape (fc.weight 9x64 instead of 5x64, fc.bias 9 instead of 5)" in message
    assert "without the head" in message


def test_another_network_is_named_briefly() -> None:
    with torch.device("meta"):
        other = create_model("resnet26").state_dict()
    message = refuse(small(), other)
    assert "missing (conv_in.weight, bn_in.weight, bn_in.bias and " in message
    assert " unexpected (" in message
    assert "without the head" not in message
    assert len(message) < 400


def test_a_colour_checkpoint_does_not_fit_a_grayscale_network() -> None:
    message = refuse(small(grayscale=True), small().state_dict())
    assert "1 of another shape (conv_in.weight 64x3x1x1 instead of 64x1x1x1)" in message


def test_what_is_no_tensor_is_named() -> None:
    state: dict[str, Any] = small().state_dict() | {"bn_in.bias": [1.0]}
    assert "bn_in.bias a list instead of 64" in refuse(small(), state)


def test_one_missing_tensor() -> None:
    state = small().state_dict()
    del state["bn1.running_var"]
    assert "1 missing (bn1.running_var)" in refuse(small(), state)
    assert "1 missing (bn1.running_var)" in refuse(small(), state, head=False)


def test_the_prefix_goes_only_where_every_key_has_it() -> None:
    x = torch.zeros(1)
    assert strip_module_prefix({"module.a": x, "module.module.b": x}) == {"a": x, "module.b": x}
    assert strip_module_prefix({"module.a": x, "b": x}) == {"module.a": x, "b": x}
    assert strip_module_prefix({}) == {}
