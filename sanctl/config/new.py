"""New configuration files: presets, or a model preset on the user's own dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sanctl.config.layers import Layers
from sanctl.config.load import check_layers
from sanctl.config.presets import (
    add_model,
    base_layers,
    dataset_names,
    preset_layers,
    preset_title,
)
from sanctl.config.problems import nearest_name
from sanctl.config.render import render
from sanctl.config.schema import (
    GRAY_MEAN,
    GRAY_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from sanctl.errors import UserError


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a dataset beside its name; None where a preset or a default decides.

    Attributes:
        data_root: The dataset's folder.
        dataset_init: How the images are stored.
        classes: Number of classes.
        grayscale: Whether the images are gray.
        image_size: Side of the network's input, in pixels.
    """

    data_root: str | None = None
    dataset_init: str | None = None
    classes: int | None = None
    grayscale: bool | None = None
    image_size: int | None = None

    def values(self) -> dict[str, Any]:
        """Return the facts as values by full key, with the statistics that follow from them."""
        facts: dict[str, Any] = {
            f"DATA.{name}": value for name, value in vars(self).items() if value is not None
        }
        if self.grayscale is not None:
            mean, std = (GRAY_MEAN, GRAY_STD) if self.grayscale else (IMAGENET_MEAN, IMAGENET_STD)
            facts |= {"DATA.mean": list(mean), "DATA.std": list(std)}
        return facts


def compose_new(
    dataset: str, model: str, facts: DatasetFacts, overrides: Sequence[str] = ()
) -> str:
    """Compose a complete, commented configuration.

    Args:
        dataset: A dataset preset, or a name for the user's own dataset.
        model: A model preset.
        facts: What is known of the dataset; for one that is no preset, data_root and classes are
            needed.
        overrides: Settings `SECTION.key=value`.

    Returns:
        The YAML, already checked.

    Raises:
        UserError: There is no such preset, a needed fact is missing, or a setting is wrong.
    """
    if dataset in dataset_names():
        layers = preset_layers(dataset, model)
        title = preset_title("datasets", dataset)
    else:
        layers = _own_dataset(dataset, model, facts)
        title = f"{dataset}: {facts.data_root}"
    _lay(layers, facts.values())
    layers.add_overrides(overrides)
    check_layers(layers)
    return render(layers.values, [title, preset_title("models", model)])


def write_new(text: str, path: Path, force: bool = False) -> None:
    """Write a new configuration file, with the folders above it.

    Args:
        text: The YAML.
        path: Where it goes.
        force: Replace a file that is there.

    Raises:
        UserError: There is a file already and `force` is not set, or it cannot be written.
    """
    if path.exists() and not force:
        raise UserError(f"{path}: exists already; --force replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _own_dataset(dataset: str, model: str, facts: DatasetFacts) -> Layers:
    if facts.data_root is None or facts.classes is None:
        raise UserError(
            f"{dataset}: no such dataset preset{nearest_name(dataset, dataset_names())}; for your"
            " own dataset give --data-root, and --classes where they cannot be counted there"
        )
    layers = base_layers(f"new configuration for {dataset}")
    _lay(layers, {"DATA.data_name": dataset})
    if facts.classes > layers.values["TRAIN.ignore_label"]:
        _lay(layers, {"TRAIN.ignore_label": -1})
    add_model(layers, model)
    return layers


def _lay(layers: Layers, values: Mapping[str, Any]) -> None:
    layers.values.update(values)
    layers.origins.update(dict.fromkeys(values, "new"))
