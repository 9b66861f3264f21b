import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_run import FilesOnly, Place, write_dataset

from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.fit import fit


@pytest.fixture
def trained(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A run made in the user's folder, so that its paths are as the command line would have."""
    monkeypatch.chdir(place.folder)
    from sanctl.config.load import resolve_config
    from sanctl.engine.run import open_run

    run = open_run(resolve_config("shapes", "tiny", ["TRAIN.epochs=1"]), device="cpu", resume=None)
    fit(run, FilesOnly(run))
    return place


BEST = "exp/shapes/tiny/model/model_best.pth"


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def publish(place: Place, path: Path, **beside: object) -> None:
    """Write a checkpoint as the original's training did, before torch had zip files."""
    weights = load_checkpoint(place.folder / BEST).state_dict
    content = {f"module.{key}": value for key, value in weights.items()}
    torch.save(
        {"epoch": 100, "state_dict": content, "top1": np.float64(77.1), **beside},
        path,
        _use_new_zipfile_serialization=False,
    )


def test_a_checkpoint_alone_is_enough(trained: Place) -> None:
    status, out, _ = trained.main("test", "--checkpoint", BEST)
    assert status == 0
    assert f"{BEST} (epoch 1) on val images:" in out
    assert {path.name for path in (trained.run / "test").iterdir()} == {
        "per_class.csv", "predictions.csv", "confusion_matrix.png", "mistakes.png"
    }  # fmt: skip
    saved = load_checkpoint(trained.folder / BEST)
    assert f"{saved.scores['top1_val']:.2f}" in out
    assert len(pd.read_csv(trained.run / "test" / "predictions.csv")) == 12


def test_dataset_and_name_mean_the_best(trained: Place) -> None:
    status, out, _ = trained.main("test", "shapes", "tiny")
    assert status == 0
    assert f"{BEST} (epoch 1) on val images:" in out


def test_the_test_split_into_another_folder(trained: Place) -> None:
    options = ("-o", "TEST.use_val_set=false", "--out", "results/here")
    for what in (("--checkpoint", BEST), ("shapes", "tiny")):
        status, out, _ = trained.main("test", *what, *options)
        assert status == 0
        assert "on test images:" in out
        predictions = pd.read_csv(trained.folder / "results" / "here" / "predictions.csv")
        assert len(predictions) == 9
        assert all("/test/" in image for image in predictions.image)
        shutil.rmtree(trained.folder / "results")
    assert not (trained.run / "test").exists()


def test_model_path_of_the_configuration(trained: Place) -> None:
    shutil.copy(trained.folder / BEST, trained.folder / "mine.pth")
    status, out, _ = trained.main("test", "shapes", "tiny", "-o", "TEST.model_path=mine.pth")
    assert status == 0
    assert "mine.pth (epoch 1)" in out


def test_a_published_checkpoint_needs_dataset_and_name(trained: Place) -> None:
    path = trained.folder / "published.pth"
    publish(trained, path)
    status, _, err = trained.main("test", "--checkpoint", "published.pth")
    assert status == 2
    line = one_line(err)
    assert "published.pth: carries no configuration" in line
    assert "sanctl test DATASET NAME --checkpoint published.pth" in line
    status, out, _ = trained.main("test", "shapes", "tiny", "--checkpoint", "published.pth")
    assert status == 0
    assert "published.pth (epoch 100) on val images:" in out
    ours = trained.main("test", "--checkpoint", BEST)[1]
    assert out.split("\n", 1)[1] == ours.split("\n", 1)[1]


def test_another_number_of_classes(trained: Place, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    for split in ("train", "val"):
        shutil.rmtree(root / split / "cross")
    options = ("-o", f"DATA.data_root={root}", "-o", "DATA.classes=2")
    status, _, err = trained.main("test", "--checkpoint", BEST, *options)
    assert status == 2
    assert "trained on 3 classes, but the images have 2" in one_line(err)
    publish(trained, trained.folder / "published.pth")
    status, _, err = trained.main(
        "test", "shapes", "tiny", "--checkpoint", "published.pth", *options
    )
    assert status == 2
    assert "fc.weight 3x64 instead of 2x64" in one_line(err)


def test_other_class_names(trained: Place, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    for split in ("train", "val"):
        (root / split / "cross").rename(root / split / "plus")
    status, _, err = trained.main("test", "--checkpoint", BEST, "-o", f"DATA.data_root={root}")
    assert status == 2
    assert "'cross' in the checkpoint and 'plus' in the data" in one_line(err)


def test_another_network(trained: Place) -> None:
    status, _, err = trained.main(
        "test", "shapes", "tiny", "--checkpoint", BEST, "-o", "TRAIN.layers=[1, 2, 1]"
    )
    assert status == 2
    line = one_line(err)
    assert BEST in line
    assert "missing (layer1.1." in line


class Hostile:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self._command,)


def test_a_hostile_checkpoint_is_refused_and_not_executed(trained: Place) -> None:
    marker = trained.folder / "marker"
    publish(trained, trained.folder / "evil.pth", best=Hostile(f"touch {marker}"))
    status, _, err = trained.main("test", "shapes", "tiny", "--checkpoint", "evil.pth")
    assert status == 2
    assert "evil.pth: refused" in one_line(err)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--checkpoint FILE, or DATASET NAME"),
        (("shapes",), "sanctl test DATASET NAME"),
        (("--checkpoint", "nowhere.pth"), "nowhere.pth: no such checkpoint"),
        (("--checkpoint", "config"), "config: a folder"),
        (("--checkpoint", "config/shapes/shapes_tiny.yaml"), "shapes_tiny.yaml: "),
        (("shapes", "other"), "other"),
        (("shapes", "tiny"), "model_best.pth: no such checkpoint"),
        (("shapes", "tiny", "--device", "tpu"), "--device tpu"),
    ],
)
def test_bad_input_is_one_line(place: Place, arguments: tuple[str, ...], words: str) -> None:
    status, out, err = place.main("test", *arguments)
    assert (status, out) == (2, "")
    assert words in one_line(err)


def test_a_missing_split(trained: Place, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    shutil.rmtree(root / "test")
    options = ("-o", f"DATA.data_root={root}", "-o", "TEST.use_val_set=false")
    status, _, err = trained.main("test", "--checkpoint", BEST, *options)
    assert status == 2
    assert str(root / "test") in one_line(err)


def test_a_folder_that_cannot_be_written(trained: Place) -> None:
    (trained.folder / "taken").write_text("a file")
    status, _, err = trained.main("test", "--checkpoint", BEST, "--out", "taken/here")
    assert status in (1, 2)
    assert "taken" in err.splitlines()[-1]
    assert "unexpected" not in err
