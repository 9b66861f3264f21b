"""The commands of `sanctl config`, on files and datasets that are really there."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from sanctl.cli.config.check import check, describe_network
from sanctl.cli.config.list_presets import list_presets
from sanctl.cli.config.new import new
from sanctl.cli.config.show import show
from sanctl.config.load import load_config, resolve_config
from sanctl.config.presets import dataset_names, model_names
from sanctl.data.detect import count_classes, detect_storage, looks_grayscale
from sanctl.data.index import index_folder, save_index
from sanctl.data.pack import pack_index
from sanctl.errors import UserError

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sanctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sanctl", *arguments], capture_output=True, text=True, check=False
    )


def draw_folders(root: Path, coloured: Sequence[str] = ()) -> None:
    """Write train/ and val/ with two images of each class; some classes in colour."""
    rng = np.random.default_rng(0)
    for part, name, number in product(("train", "val"), CLASSES, range(2)):
        folder = root / part / name
        folder.mkdir(parents=True, exist_ok=True)
        channels = 3 if name in coloured else 1
        image = rng.integers(0, 256, (20, 24, channels), dtype=np.uint8)
        assert cv2.imwrite(str(folder / f"{number}.png"), image)


def write_indexes(root: Path) -> None:
    for part in ("train", "val"):
        save_index(index_folder(root / part)[0], root / f"{part}_init.pt")


def write_packs(root: Path) -> None:
    for part in ("train", "val"):
        index, _ = index_folder(root / part)
        pack_index(index, root / part, root / f"{part}_imgs.pt", workers=0)


def write_texts(root: Path) -> None:
    mapping = "".join(f"{name}\t{number}\n" for number, name in enumerate(CLASSES))
    (root / "mapping.txt").write_text(mapping)
    for part in ("train", "val"):
        lines = (
            f"{part}/{name}/{image}.png\t{number}\n"
            for number, name in enumerate(CLASSES)
            for image in range(2)
        )
        (root / f"{part}.txt").write_text("".join(lines))


@pytest.mark.parametrize("model", model_names())
def test_every_preset_passes_the_check(model: str) -> None:
    for dataset in dataset_names():
        loaded = resolve_config(dataset, model)
        assert f"{loaded.config.DATA.classes} classes" in describe_network(loaded)


def test_write_show_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new("mnist", "resnet26", override=["TRAIN.epochs=3"])
    path = Path("config/mnist/mnist_resnet26.yaml")
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {path}",
        "next: sanctl train mnist resnet26",
    ]
    assert yaml.safe_load(path.read_text())["TRAIN"]["epochs"] == 3

    show("mnist", "resnet26", override=["DATA.image_size=64"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["DATA.image_size", "64", "override"] in rows
    assert ["DATA.resize", "73", "default"] in rows
    assert ["TRAIN.epochs", "3", f"{path}:{line_of(path, '  epochs: 3')}"] in rows

    check(["mnist", "resnet26"])
    assert "resnet with 11.7M parameters, 10 classes, 1 x 224 x 224 px" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        new("mnist", "resnet26")


def line_of(path: Path, line: str) -> int:
    return path.read_text().splitlines().index(line) + 1


def test_check_tells_everything_and_exits_with_2(tmp_path: Path) -> None:
    Path("good.yaml").write_text("DATA: {data_root: d, classes: 5}\nTRAIN: {model: resnet26}\n")
    Path("typo.yaml").write_text("DATA: {data_root: d, clases: 5}\nTRAIN: {model: nl}\n")
    Path("small.yaml").write_text(
        "DATA: {data_root: d, classes: 5, image_size: 64}\nTRAIN: {model: san10_pairwise}\n"
    )
    Path("widths.yaml").write_text(
        "DATA: {data_root: d, classes: 5}\n"
        "TRAIN: {arch: san, sa_type: 0, layers: [1, 1, 1, 1, 1], widths: [50, 64, 64, 64, 64]}\n"
    )
    Path("name.yaml").write_text("DATA: {data_root: d, classes: 5}\nTRAIN: {model: resnet62}\n")
    done = sanctl(
        "config", "check", "good.yaml", "typo.yaml", "small.yaml", "widths.yaml", "name.yaml"
    )
    assert done.returncode == 2
    out = done.stdout.splitlines()
    assert out[0].startswith("good.yaml: ok, resnet26 with ")
    assert out[1:] == [
        "typo.yaml: 2 problems",
        "small.yaml: 1 problem",
        "widths.yaml: 1 problem",
        "name.yaml: 1 problem",
    ]
    errors = done.stderr.splitlines()
    assert errors[0].endswith("typo.yaml:1: DATA.clases: unknown key, did you mean DATA.classes?")
    assert errors[1] == "typo.yaml: DATA.classes: missing, and it has no default"
    assert errors[2].startswith("small.yaml: ")
    assert "at least 128 px" in errors[2]
    assert errors[3].startswith("widths.yaml: ")
    assert "50" in errors[3]
    assert errors[4].startswith("name.yaml: ")
    assert "resnet26" in errors[4]
    assert len(errors) == 5


def test_output_in_a_pipe_is_plain_and_whole() -> None:
    listed = sanctl("config", "list")
    shown = sanctl("config", "show", "sketch_eitz", "hybrid_patch_2-2_nl")
    assert listed.returncode == shown.returncode == 0
    for name in (*dataset_names(), *model_names()):
        assert any(line.split()[:1] == [name] for line in listed.stdout.splitlines())
    assert "No files under config/ yet" in listed.stdout
    assert "preset hybrid_patch_2-2_nl" in shown.stdout
    assert "preset sketch_eitz" in shown.stdout
    assert shown.stderr.startswith("note: config/sketch_eitz/")
    for text in (listed.stdout, shown.stdout, shown.stderr):
        assert all(char.isprintable() or char == "\n" for char in text)
        assert "…" not in text


def test_list_names_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    new("mnist", "nl")
    capsys.readouterr()
    list_presets()
    assert "config/mnist/mnist_nl.yaml" in capsys.readouterr().out.splitlines()


def test_storage_is_seen_the_fastest_first() -> None:
    root = Path("dataset/pets")
    root.mkdir(parents=True)
    assert detect_storage(root) is None
    draw_folders(root)
    write_texts(root)
    found = [(detect_storage(root), looks_grayscale(root, "txt_mappings", 3))]
    for write in (write_indexes, write_packs):
        write(root)
        kind = detect_storage(root)
        assert kind is not None
        found.append((kind, looks_grayscale(root, kind, 3)))
        assert count_classes(root, kind) == 3
    assert found == [("image_folder", True), ("preprocessed_paths", True), ("byte_imgs", True)]
    assert count_classes(root, "image_folder") == count_classes(root, "txt_mappings") == 3


def test_own_dataset_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    draw_folders(Path("dataset/pets"))
    new("pets", "san_tiny", image_size=64)
    assert "dataset: dataset/pets, image_folder, 3 classes, grayscale" in capsys.readouterr().out
    data = load_config(Path("config/pets/pets_san_tiny.yaml")).config.DATA
    assert (data.data_root, data.dataset_init, data.classes) == ("dataset/pets", "image_folder", 3)
    assert (data.grayscale, data.image_size, data.mean) == (True, 64, [0.1307])


def test_one_class_in_colour_makes_a_dataset_coloured() -> None:
    root = Path("elsewhere/pets")
    draw_folders(root, coloured=["owl"])
    new("pets", "resnet26", data_root=root, out=Path("mine.yaml"))
    data = load_config(Path("mine.yaml")).config.DATA
    assert (data.data_root, data.in_chans, data.mean) == (str(root), 3, [0.485, 0.456, 0.406])
    new("pets", "resnet26", data_root=root, out=Path("mine.yaml"), grayscale=True, force=True)
    assert load_config(Path("mine.yaml")).config.DATA.in_chans == 1


def test_a_preset_takes_what_lies_in_its_folder() -> None:
    root = Path("dataset/Sketch_EITZ")
    draw_folders(root)
    write_indexes(root)
    write_packs(root)
    new("sketch_eitz", "nl")
    data = load_config(Path("config/sketch_eitz/sketch_eitz_nl.yaml")).config.DATA
    assert (data.dataset_init, data.classes, data.grayscale) == ("byte_imgs", 3, True)


def test_a_dataset_that_comes_later() -> None:
    new("birds", "nl", classes=7, out=Path("b.yaml"))
    data = load_config(Path("b.yaml")).config.DATA
    assert (data.data_root, data.classes, data.dataset_init) == ("dataset/birds", 7, "image_folder")


def test_datasets_that_are_not_ready() -> None:
    with pytest.raises(UserError, match="birds: no such dataset preset; for your own dataset"):
        new("birds", "nl")
    Path("dataset/birds").mkdir(parents=True)
    with pytest.raises(UserError, match="dataset/birds: no training and validation images there"):
        new("birds", "nl")


@pytest.mark.parametrize("damaged", ["train_init.pt", "train_imgs.pt"])
def test_a_damaged_file_is_named(damaged: str) -> None:
    root = Path("dataset/pets")
    draw_folders(root)
    for name in (damaged, damaged.replace("train", "val")):
        (root / name).write_bytes(b"not a file of torch")
    with pytest.raises(UserError, match=damaged):
        new("pets", "nl")


def test_a_file_is_shown_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text("DATA: {data_root: d, classes: 5}\nTRAIN: {model: nl}\n")
    show("x.yaml")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["TRAIN.model", "nl", "x.yaml:2"] in rows
    with pytest.raises(UserError, match=r"y\.yaml: no such file"):
        show("y.yaml")
