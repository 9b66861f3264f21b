"""The presets: composed files are complete, commented, and hold the values of their parts."""

from importlib.resources import files
from itertools import product
from typing import Any

import pytest
import yaml

from sanctl.config.layers import Layers
from sanctl.config.load import check_layers
from sanctl.config.presets import compose, dataset_names, model_names, preset_layers
from sanctl.config.schema import SECTIONS, Config
from sanctl.errors import UserError
from sanctl_models import list_models, model_kwargs

PAIRS = list(product(dataset_names(), model_names()))
TEMPLATES = files("sanctl_templates")


def template(*path: str) -> Any:
    return yaml.safe_load(TEMPLATES.joinpath(*path).read_text(encoding="utf-8"))


def composed(dataset: str, model: str) -> Config:
    layers = Layers(f"{dataset} {model}")
    layers.add_mapping(yaml.safe_load(compose(dataset, model)), {})
    return check_layers(layers)


def test_names() -> None:
    assert dataset_names() == ["imagenet", "mini_quickdraw", "mnist", "sketch_eitz"]
    assert set(model_names()) == {*list_models(), "san_tiny"}


@pytest.mark.parametrize("name", list_models())
def test_model_presets_are_the_registry(name: str) -> None:
    assert template("models", f"{name}.yaml") == {"TRAIN": model_kwargs(name)}


@pytest.mark.parametrize(("dataset", "model"), PAIRS)
def test_composed_values_are_those_of_the_parts(dataset: str, model: str) -> None:
    merged: dict[str, dict[str, Any]] = {}
    for part in (("base.yaml",), ("datasets", f"{dataset}.yaml"), ("models", f"{model}.yaml")):
        for section, values in template(*part).items():
            merged.setdefault(section, {}).update(values)
    text = yaml.safe_load(compose(dataset, model))
    for section, values in merged.items():
        for key, value in values.items():
            assert text[section][key] == value, f"{section}.{key}"
    layers = Layers("composed")
    layers.add_mapping(text, {})
    assert check_layers(layers) == check_layers(preset_layers(dataset, model))


@pytest.mark.parametrize(
    ("dataset", "root", "classes", "channels", "batches", "epochs", "gpus"),
    [
        ("sketch_eitz", "dataset/Sketch_EITZ", 250, 1, (64, 32), 100, 1),
        ("mini_quickdraw", "dataset/miniQuickDraw", 300, 1, (64, 32), 20, 1),
        ("mnist", "dataset/MNIST", 10, 1, (32, 16), 10, 1),
        ("imagenet", "dataset/ILSVRC2012", 1000, 3, (256, 128), 100, 8),
    ],
)
def test_dataset_presets(
    dataset: str,
    root: str,
    classes: int,
    channels: int,
    batches: tuple[int, int],
    epochs: int,
    gpus: int,
) -> None:
    config = composed(dataset, "san10_patchwise")
    data, train = config.DATA, config.TRAIN
    assert (data.data_root, data.classes, data.in_chans) == (root, classes, channels)
    assert data.mean == ([0.1307] if channels == 1 else [0.485, 0.456, 0.406])
    assert data.std == ([0.3081] if channels == 1 else [0.229, 0.224, 0.225])
    assert (train.batch_size, train.batch_size_val) == batches
    assert (train.epochs, len(train.train_gpu)) == (epochs, gpus)
    assert train.step_epochs == ([3, 6, 9] if dataset == "mnist" else [30, 60, 90])
    assert (train.base_lr, train.scheduler, train.label_smoothing) == (0.1, "cosine", 0.1)
    assert (train.momentum, train.weight_decay, train.ignore_label) == (0.9, 1e-4, 2000)


def test_every_key_stands_below_its_comment() -> None:
    lines = compose("mnist", "resnet26").splitlines()
    section = ""
    keys = []
    for above, line in zip(["", *lines], lines, strict=False):
        if line.startswith("  ") and not line.startswith("  #"):
            keys.append(f"{section}.{line.partition(':')[0].strip()}")
            assert above.startswith("  # "), line
        elif line and not line.lstrip().startswith("#"):
            section = line.removesuffix(":")
            assert above.startswith("# "), line
    unused = {"DATA.split", "DATA.split_ratio", "TRAIN.time_breakdown"}
    fields = [f"{name}.{key}" for name, model in SECTIONS.items() for key in model.model_fields]
    assert keys == [key for key in fields if key not in unused]
    assert max(map(len, lines)) <= 100


def test_choices_stand_in_the_comments() -> None:
    text = " ".join(line.strip("# ") for line in compose("mnist", "nl").splitlines())
    for choice in ("image_folder", "preprocessed_paths", "byte_imgs", "txt_mappings", "adamw"):
        assert choice in text
    for section, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            assert field.description, f"{section}.{key}"


@pytest.mark.parametrize(
    ("dataset", "model", "message"),
    [
        ("mnits", "nl", "mnits: no such dataset preset, did you mean mnist?"),
        ("mnist", "san10_pairwize", "no such model preset, did you mean san10_pairwise?"),
    ],
)
def test_unknown_presets(dataset: str, model: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(dataset, model)
    assert message in str(caught.value)
