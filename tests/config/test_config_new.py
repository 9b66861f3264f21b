"""New configuration files, for presets and for the user's own dataset."""

from pathlib import Path

import pytest

from sanctl.config.load import load_config
from sanctl.config.new import DatasetFacts, compose_new, write_new
from sanctl.config.presets import compose
from sanctl.errors import UserError


def test_a_preset_as_it_is() -> None:
    assert compose_new("mnist", "nl", DatasetFacts()) == compose("mnist", "nl")


def test_own_dataset(tmp_path: Path) -> None:
    facts = DatasetFacts(str(tmp_path), "byte_imgs", 136, True, 64)
    text = compose_new("omniglot", "san_tiny", facts, ["TRAIN.epochs=30", "TRAIN.base_lr=0.05"])
    path = tmp_path / "config" / "omniglot" / "omniglot_san_tiny.yaml"
    write_new(text, path)
    loaded = load_config(path)
    data, train = loaded.config.DATA, loaded.config.TRAIN
    assert (data.data_root, data.dataset_init, data.data_name) == (
        str(tmp_path),
        "byte_imgs",
        "omniglot",
    )
    assert (data.classes, data.grayscale, data.image_size, data.resize) == (136, True, 64, 73)
    assert (data.mean, data.std) == ([0.1307], [0.3081])
    assert (train.arch, train.epochs, train.base_lr) == ("san", 30, 0.05)
    assert loaded.run_dir == Path("exp/omniglot/san_tiny")
    assert text.startswith(f"# omniglot: {tmp_path}\n# san_tiny: ")


def test_facts_replace_those_of_a_preset() -> None:
    facts = DatasetFacts("elsewhere", "byte_imgs", 20, False)
    text = compose_new("mnist", "nl", facts)
    for line in (
        "  data_root: elsewhere",
        "  classes: 20",
        "  grayscale: false",
        "  mean: [0.485, 0.456, 0.406]",
    ):
        assert line in text.splitlines()


def test_many_classes_leave_no_label_out() -> None:
    facts = DatasetFacts("data", "byte_imgs", 3000, False)
    assert "  ignore_label: -1" in compose_new("many", "nl", facts).splitlines()
    with pytest.raises(UserError, match="2000 is one of the 3000 classes"):
        compose_new("many", "nl", facts, ["TRAIN.ignore_label=2000"])


@pytest.mark.parametrize(
    ("dataset", "facts", "overrides", "message"),
    [
        ("mnits", DatasetFacts(), [], "did you mean mnist?; for your own dataset give --data-root"),
        ("birds", DatasetFacts("data"), [], "--classes where they cannot be counted"),
        ("mnist", DatasetFacts(image_size=0), [], "DATA.image_size: expected at least 1, got 0"),
        ("mnist", DatasetFacts(), ["TRAIN.epoch=1"], "did you mean TRAIN.epochs?"),
    ],
)
def test_refused(dataset: str, facts: DatasetFacts, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_new(dataset, "nl", facts, overrides)
    assert message in str(caught.value)


def test_files_are_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"x\.yaml: exists already; --force replaces it"):
        write_new("new", path)
    assert path.read_text() == "mine"
    write_new("new", path, force=True)
    assert path.read_text() == "new"
    with pytest.raises(UserError, match="cannot be written"):
        write_new("new", path / "below.yaml")
