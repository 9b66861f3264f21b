"""A dataset with bad images: all are found, none is trained on, and no file is changed."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from bad_images import CLASSES, KINDS, snapshot, spoil, write_images
from tiny_run import FilesOnly, Place, ctrl_c_at

from sanctl.config.schema import DataConfig
from sanctl.data.index import index_folder
from sanctl.data.loader import Batch, eval_loader, train_loader
from sanctl.data.sampler import epoch_order
from sanctl.data.source import FileSource
from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import InterruptedRunError
from sanctl.errors import SanctlError

TRAIN, VAL, BAD_TRAIN, BAD_VAL = 200, 40, 10, 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad") / "pictures"
    write_images(root / "train", TRAIN, BAD_TRAIN)
    write_images(root / "val", VAL, BAD_VAL, seed=1)
    return root


@pytest.fixture
def bad(dataset: Path) -> Iterator[dict[str, set[str]]]:
    """The bad files of each part; whatever a test does, no file has changed after it."""
    before = snapshot(dataset)
    yield {
        part: {str(path) for number, path in enumerate(paths) if number % (count // spoiled) == 0}
        for part, count, spoiled in (("train", TRAIN, BAD_TRAIN), ("val", VAL, BAD_VAL))
        for paths in [sorted((dataset / part).rglob("*.*"), key=lambda path: path.name)]
    }
    assert snapshot(dataset) == before


@pytest.fixture
def pictures(tmp_path: Path, dataset: Path) -> Place:
    place = Place(tmp_path, dataset)
    text = place.config.read_text().replace("classes: 3", f"classes: {CLASSES}")
    place.config.write_text(text.replace("epochs: 3", "epochs: 1\n  step_epochs: [1]"))
    return place


def listed(folder: Path, part: str) -> list[str]:
    lines = (folder / "skipped_images.txt").read_text().splitlines()
    return [line.split("\t")[1] for line in lines if line.split("\t")[0] == part]


def test_check_names_exactly_the_bad_ones(dataset: Path, bad: dict[str, set[str]]) -> None:
    place = Place(dataset.parent, dataset)
    status, out, _ = place.main("dataset", "check", str(dataset), "--workers", "0")
    assert status == 1
    named = re.findall(r"^damaged \((\w+)\): (.+?): ", out, re.MULTILINE)
    for part, files in bad.items():
        assert {name for found, name in named if found == part} == files
    assert len(named) == BAD_TRAIN + BAD_VAL
    assert "240 images: 15 damaged, 0 groups of duplicates, 0 groups in several parts" in out


@pytest.mark.parametrize(
    "how",
    [["-o", "TRAIN.workers=0"], ["-o", "TRAIN.workers=2"], ["--nproc", "2", "--device", "cpu"]],
    ids=["alone", "with workers", "two processes"],
)
def test_training_leaves_out_and_lists_the_bad_ones(
    pictures: Place, bad: dict[str, set[str]], how: list[str]
) -> None:
    ended = pictures.sanctl("train", "shapes", "tiny", "-o", "DATA.bad_images=skip", *how)
    out = ended.stdout
    assert ended.returncode == 0, ended.stderr
    assert "note train: 190 images used, 10 left out that cannot be read, listed in " in out
    assert "note val: 35 images used, 5 left out that cannot be read, listed in " in out
    assert sorted(listed(pictures.run, "train")) == sorted(bad["train"])
    assert sorted(listed(pictures.run, "val")) == sorted(bad["val"])
    assert sorted(listed(pictures.run / "test", "val")) == sorted(bad["val"])
    assert re.search(r"^images +35$", out, re.MULTILINE)
    predictions = (pictures.run / "test" / "predictions.csv").read_text()
    assert len(predictions.splitlines()) == 1 + 35
    assert not any(name in predictions for name in bad["val"])


def test_by_default_a_bad_image_ends_the_run_in_one_line(
    pictures: Place, bad: dict[str, set[str]]
) -> None:
    status, _, err = pictures.main("train", "shapes", "tiny")
    assert status == 2
    (line,) = err.splitlines()
    assert any(name in line for name in bad["train"])
    assert "DATA.bad_images=skip" in line


def config(**keys: object) -> DataConfig:
    values = {"data_root": ".", "classes": CLASSES, "image_size": 16, "resize": 18}
    return DataConfig.model_validate(values | keys)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_no_other_image_takes_the_place(tmp_path: Path, workers: int, batch_size: int) -> None:
    """The batches are those of the whole dataset, less the bad images."""
    write_images(tmp_path, 40)
    source = FileSource(index_folder(tmp_path)[0])
    train = partial(train_loader, batch_size=batch_size, workers=workers, seed=5)
    evaluation = partial(eval_loader, batch_size=batch_size, workers=workers)

    def batches(bad_images: str) -> tuple[list[Batch], list[Batch]]:
        data = config(bad_images=bad_images)
        return list(train(source, data).epoch(2)), list(evaluation(source, data))

    whole = batches("error")
    bad = [int(index) for index in epoch_order(5, 2, 40)[6:12]]
    for number, index in enumerate(bad):
        spoil(source.path(index), KINDS[number % len(KINDS)])
    for before, after in zip(whole, batches("skip"), strict=True):
        assert len(before) == len(after)
        for old, new in zip(before, after, strict=True):
            kept = [at for at, index in enumerate(old.indices.tolist()) if index not in bad]
            assert new.indices.tolist() == old.indices[kept].tolist()
            assert new.targets.tolist() == old.targets[kept].tolist()
            assert not kept or torch.equal(new.images, old.images[kept])
            left_out = {skipped.number for skipped in new.skipped}
            assert left_out == set(old.indices.tolist()) & set(bad)


@pytest.fixture
def holey(tmp_path: Path) -> Place:
    """40 images, of which those of the third to fifth step are bad, and one of the sixth."""
    root = tmp_path / "own"
    write_images(root / "train", 40)
    write_images(root / "val", 10, seed=1)
    place = Place(tmp_path, root)
    place.config.write_text(place.config.read_text().replace("classes: 3", f"classes: {CLASSES}"))
    files = FileSource(index_folder(root / "train")[0])
    order = epoch_order(place.open(exp="exp/none").seed, 1, len(files))
    for index in order[2 * 4 : 5 * 4 + 1]:
        spoil(files.path(int(index)), "truncated")
    return place


def test_processes_take_every_step_together_beside_those_without_images(holey: Place) -> None:
    """Three steps have no image for anybody, one none for one of them."""
    options = ["-o", "DATA.bad_images=skip", "-o", "TRAIN.epochs=1", "--no-test"]
    ended = holey.sanctl("train", "shapes", "tiny", *options, "--device", "cpu", "--nproc", "4")
    assert ended.returncode == 0, ended.stderr
    assert "note train: 27 images used, 13 left out that cannot be read" in ended.stdout
    assert len(listed(holey.run, "train")) == 13
    assert load_checkpoint(holey.model / "train_epoch_1.pth").epoch == 1


@pytest.mark.parametrize("step", [2, 6, 7])
def test_a_run_goes_on_exactly_beside_steps_without_images(holey: Place, step: int) -> None:
    options = ["DATA.bad_images=skip", "TRAIN.epochs=2"]
    whole = holey.open(*options, exp="exp/whole")
    fit(whole, FilesOnly(whole))
    first = holey.open(*options)
    with pytest.raises(InterruptedRunError):
        fit(first, FilesOnly(first, ctrl_c_at(1, step)))
    second = holey.open(*options, resume="auto")
    fit(second, FilesOnly(second))
    one, other = (load_checkpoint(run.folder.checkpoint(2)).state_dict for run in (whole, second))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.folder.metrics.read_text() == second.folder.metrics.read_text()
    lists = [(run.folder.root / "skipped_images.txt").read_text() for run in (whole, second)]
    assert lists[0] == lists[1]
    assert len(lists[0].splitlines()) == 13


def test_an_image_left_alone_that_cannot_be_normalised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "own"
    write_images(root / "train", 20)
    write_images(root / "val", 10, seed=1)
    place = Place(tmp_path, root)
    resnet = ["TRAIN.arch=resnet", "TRAIN.layers=[1,1,1,1]", "TRAIN.sa_type=", "TRAIN.widths="]
    resnet += ["TRAIN.kernels=", "TRAIN.epochs=1", "TRAIN.batch_size=2", f"DATA.classes={CLASSES}"]
    spoil(root / "train" / "class3" / "00003.png", "truncated")
    run = place.open(*resnet, "DATA.bad_images=skip")
    notes: list[str] = []
    reporter = FilesOnly(run)
    reporter.note = notes.append
    fit(run, reporter)
    assert notes[-1].startswith("train: 18 images used, 1 left out that cannot be read")
    assert notes[-1].endswith("; with them 1 left alone in a batch")


def test_a_part_without_a_readable_image_ends_the_run(tmp_path: Path) -> None:
    root = tmp_path / "own"
    write_images(root / "train", 20)
    for path in write_images(root / "val", 10, bad=10):
        assert path.is_symlink() or path.exists()
    place = Place(tmp_path, root)
    place.config.write_text(place.config.read_text().replace("classes: 3", f"classes: {CLASSES}"))
    run = place.open("DATA.bad_images=skip")
    with pytest.raises(SanctlError, match=r"none of the val images can be read; .*skipped_images"):
        fit(run, FilesOnly(run))
