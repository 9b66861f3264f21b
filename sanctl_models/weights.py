"""Loading of published and own weights, with a message that says which tensors do not fit."""

from collections.abc import Mapping

from torch import Tensor, nn

HEAD = "fc."
_PREFIX = "module."
_NAMED = 3


def strip_module_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict without the prefix that data-parallel wrappers put before every key.

    The prefix `module.` goes only where every key has it.
    """
    if all(key.startswith(_PREFIX) for key in state_dict):
        return {key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    return dict(state_dict)


def load_state(model: nn.Module, state_dict: Mapping[str, Tensor], head: bool = True) -> None:
    """Load a state_dict strictly; nothing is loaded unless everything fits.

    Args:
        model: the network; its weights are overwritten.
        state_dict: as saved from the same network, with or without the prefix `module.`.
        head: load the classifier `fc`, too; False keeps the model's own, so that weights of
            another number of classes fit.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; the message counts and
            names them.
    """
    own = model.state_dict()
    loaded = strip_module_prefix(state_dict)
    if not head:
        loaded = {key: value for key, value in loaded.items() if not key.startswith(HEAD)}
        loaded |= {key: value for key, value in own.items() if key.startswith(HEAD)}
    problems = _differences(own, loaded)
    if problems:
        raise ValueError(f"the weights do not fit this network: {problems}")
    model.load_state_dict(loaded)


def _differences(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str:
    """Describe in one line how the loaded tensors differ from the model's own; empty if not."""
    shapes = [
        f"{key} {_shape(loaded[key])} instead of {_shape(own[key])}"
        for key in own
        if key in loaded and _shape(loaded[key]) != _shape(own[key])
    ]
    groups = {
        "missing": [key for key in own if key not in loaded],
        "unexpected": [key for key in loaded if key not in own],
        "of another shape": shapes,
    }
    texts = [_shorten(kind, names) for kind, names in groups.items() if names]
    if shapes and all(name.startswith(HEAD) for name in shapes) and len(texts) == 1:
        texts.append(
            "only the classifier differs: build the network for as many classes, or load the "
            "weights without the head"
        )
    return "; ".join(texts)


def _shorten(kind: str, names: list[str]) -> str:
    named = ", ".join(names[:_NAMED])
    rest = len(names) - _NAMED
    return f"{len(names)} {kind} ({named}{f' and {rest} more' if rest > 0 else ''})"


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return "x".join(str(side) for side in value.shape) or "scalar"
