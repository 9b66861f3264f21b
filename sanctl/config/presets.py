"""Presets: the values in `sanctl_templates`, datasets times models, composed into whole files."""

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath

from sanctl.config.document import Document, parse_document
from sanctl.config.layers import Layers
from sanctl.config.problems import nearest_name
from sanctl.config.render import render
from sanctl.errors import UserError


def dataset_names() -> list[str]:
    """Return the names of the dataset presets, sorted."""
    return _names("datasets")


def model_names() -> list[str]:
    """Return the names of the model presets, sorted."""
    return _names("models")


def preset_title(kind: str, name: str) -> str:
    """Return what a preset is, in words: the first line of its template.

    Args:
        kind: `datasets` or `models`.
        name: One of its names.
    """
    return _text(kind, name).splitlines()[0].removeprefix("# ")


def preset_data_root(dataset: str) -> str:
    """Return the folder in which a dataset preset expects its data."""
    return str(_document("datasets", dataset).values["DATA"]["data_root"])


def preset_layers(dataset: str, model: str) -> Layers:
    """Return the values of a dataset preset with those of a model preset over them.

    Raises:
        UserError: There is no preset of one of these names.
    """
    layers = base_layers(f"preset {dataset} {model}")
    _add(layers, "datasets", dataset)
    _add(layers, "models", model)
    return layers


def base_layers(source: str) -> Layers:
    """Return the values that all presets share."""
    layers = Layers(source)
    layers.add_mapping(_document(".", "base").values, {})
    layers.origins = dict.fromkeys(layers.origins, "preset base")
    return layers


def add_model(layers: Layers, model: str) -> None:
    """Lay a model preset's values over others.

    Raises:
        UserError: There is no such preset.
    """
    _add(layers, "models", model)


def compose(dataset: str, model: str) -> str:
    """Return the complete, commented configuration of a dataset preset and a model preset.

    Raises:
        UserError: There is no preset of one of these names.
    """
    titles = [preset_title("datasets", dataset), preset_title("models", model)]
    return render(preset_layers(dataset, model).values, titles)


def _add(layers: Layers, kind: str, name: str) -> None:
    document = _document(kind, name)
    layers.add_mapping(document.values, dict.fromkeys(document.lines, f"preset {name}"))


def _folder(kind: str) -> Traversable:
    return files("sanctl_templates").joinpath(kind)


@cache
def _names(kind: str) -> list[str]:
    names = (entry.name for entry in _folder(kind).iterdir())
    return sorted(PurePath(name).stem for name in names if name.endswith(".yaml"))


@cache
def _text(kind: str, name: str) -> str:
    if name not in _names(kind):
        raise UserError(
            f"{name}: no such {kind.removesuffix('s')} preset{nearest_name(name, _names(kind))}"
            " (`sanctl config list` shows them)"
        )
    return (_folder(kind) / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def _document(kind: str, name: str) -> Document:
    return parse_document(_text(kind, name), f"{kind}/{name}.yaml")
