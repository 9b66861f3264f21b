"""Networks from a name or from the keys of a YAML file."""

from collections.abc import Callable, Sequence
from typing import Any

from sanctl_models.checks import check_choice, check_integer
from sanctl_models.hybrid import Hybrid
from sanctl_models.network import Network
from sanctl_models.nl import NonLocalNet
from sanctl_models.registry import model_kwargs
from sanctl_models.resnet import ResNet
from sanctl_models.san import SAN

_ARCHS: dict[str, Callable[..., Network]] = {
    "san": SAN,
    "resnet": ResNet,
    "nl": NonLocalNet,
    "hybrid": Hybrid,
}
_REQUIRED = {
    "san": ("layers", "sa_type"),
    "resnet": ("layers",),
    "nl": ("layers",),
    "hybrid": ("layers", "layer_types", "widths"),
}
_OPTIONAL = {
    "san": ("widths", "kernels"),
    "resnet": (),
    "nl": (),
    "hybrid": ("sa_type", "added_nl_blocks"),
}


def build_model(
    *,
    classes: int,
    arch: str | None = None,
    layers: Sequence[int] | None = None,
    grayscale: bool = False,
    sa_type: int | None = None,
    kernels: Sequence[int] | None = None,
    layer_types: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
    added_nl_blocks: Sequence[int] | None = None,
    model: str | None = None,
) -> Network:
    """Build a network from the keys of a YAML file; None stands for a key that is not given.

    Args:
        classes: outputs of the classifier.
        arch: "san", "resnet", "nl" or "hybrid".
        layers: blocks of each stage.
        grayscale: take images of one channel, not three.
        sa_type: 0 for pairwise, 1 for patchwise attention (san, hybrid).
        kernels: side of each stage's attention windows (san); by default 3,7,7,7,7.
        layer_types: "res", "san" or "nl" for each stage (hybrid).
        widths: channels of each stage (hybrid; san, by default 64,256,512,1024,2048).
        added_nl_blocks: non-local blocks added to each stage (hybrid); by default none.
        model: a name out of `list_models()`, which gives every key of the above, from arch on,
            that is not given.

    Returns:
        The network, in training mode, with initial weights.

    Raises:
        ValueError: a key is missing, not one of this arch, or its value is wrong; the message
            names key, value and mend.
    """
    given = {
        "arch": arch,
        "layers": layers,
        "sa_type": sa_type,
        "kernels": kernels,
        "layer_types": layer_types,
        "widths": widths,
        "added_nl_blocks": added_nl_blocks,
    }
    description = _describe(model, given)
    return _construct(description, classes, in_chans=1 if grayscale else 3)


def create_model(
    name: str, num_classes: int = 1000, in_chans: int = 3, **overrides: Any
) -> Network:
    """Build a named network.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier.
        in_chans: channels of the images, 3 for colour, 1 for grayscale.
        overrides: keys of `build_model`, from layers to added_nl_blocks, that replace the named
            network's own.

    Returns:
        The network, in training mode, with initial weights.

    Raises:
        ValueError: there is no such network, or an override is wrong.
    """
    return _construct(_describe(name, overrides), num_classes, in_chans)


def _describe(model: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that are given, and those of the named model where they are not."""
    given = {key: value for key, value in given.items() if value is not None}
    if model is None:
        return given
    named = model_kwargs(model)
    if given.get("arch", named["arch"]) != named["arch"]:
        raise ValueError(
            f"arch: {given['arch']!r} contradicts model: {model!r}, whose arch is "
            f"{named['arch']!r}; leave one of them out"
        )
    return named | given


def _construct(description: dict[str, Any], classes: int, in_chans: int) -> Network:
    check_integer("classes", classes)
    check_integer("in_chans", in_chans)
    keys = dict(description)
    if "arch" not in keys:
        raise ValueError(f"arch: missing; give one of {', '.join(_ARCHS)}, or a model")
    arch = keys.pop("arch")
    check_choice("arch", arch, tuple(_ARCHS))
    missing = [key for key in _REQUIRED[arch] if key not in keys]
    if missing:
        raise ValueError(f"{missing[0]}: missing, but arch {arch!r} needs it; add it")
    allowed = _REQUIRED[arch] + _OPTIONAL[arch]
    for key, value in keys.items():
        if key not in allowed:
            raise ValueError(
                f"{key}: {value!r} is no key of arch {arch!r}, which takes "
                f"{', '.join(allowed)}; remove it"
            )
    return _ARCHS[arch](**keys, num_classes=classes, in_chans=in_chans)
