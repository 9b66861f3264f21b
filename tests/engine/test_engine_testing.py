"""Testing a checkpoint: its files agree with each other and with a computation by hand."""

import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_run import CLASSES, IMAGES, FilesOnly, Place, write_dataset

from sanctl.config.schema import Config
from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.engine.fit import fit
from sanctl.engine.testing import TestResult, open_test_source, run_test
from sanctl.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def trained(place: Place) -> Place:
    run = place.open("TRAIN.epochs=2")
    fit(run, FilesOnly(run))
    return place


def run_on(config: Config, saved: Checkpoint, folder: Path) -> TestResult:
    source, split = open_test_source(config)
    seen: list[int] = []
    result = run_test(
        config, saved, Path("x.pth"), source, split, folder, CPU, seen.append, pytest.fail
    )
    assert sum(seen) == len(source)
    return result


def best(place: Place) -> Checkpoint:
    return load_checkpoint(place.model / "model_best.pth")


@pytest.mark.parametrize(("use_val_set", "split"), [("true", "val"), ("false", "test")])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_tested_once_and_the_files_agree(
    trained: Place, tmp_path: Path, use_val_set: str, split: str, workers: int
) -> None:
    config = trained.load(f"TEST.use_val_set={use_val_set}", f"TEST.test_workers={workers}").config
    folder = tmp_path / "out"
    result = run_on(config, best(trained), folder)
    assert {path.name for path in folder.iterdir()} == {
        "per_class.csv",
        "predictions.csv",
        "confusion_matrix.png",
        "mistakes.png",
    }
    predictions = pd.read_csv(folder / "predictions.csv")
    paths = sorted((Path(config.DATA.data_root) / split).glob("*/*.png"))
    assert len(paths) == IMAGES[split] * len(CLASSES)
    assert sorted(predictions.image) == [str(path) for path in paths]
    assert (predictions.true == [Path(image).parent.name for image in predictions.image]).all()
    right = predictions.true == predictions.predicted
    assert (predictions.correct == right).all()
    assert predictions.confidence.between(1 / 3, 1).all()

    assert result.split == split
    assert result.overall.images == len(paths)
    assert result.mistakes == (~right).sum()
    assert result.overall.top1 == pytest.approx(100 * right.mean())
    assert result.overall.accuracy == pytest.approx(right.mean())
    assert result.overall.top5 == 100  # of three classes
    table = pd.read_csv(folder / "per_class.csv").set_index("class")
    assert list(table.index) == CLASSES
    for name in CLASSES:
        true, predicted = predictions.true == name, predictions.predicted == name
        assert table.images[name] == true.sum()
        assert table.top1[name] == pytest.approx(100 * (true & predicted).sum() / true.sum())
        union = (true | predicted).sum()
        assert table.iou[name] == pytest.approx((true & predicted).sum() / union)
    assert result.overall.mean_iou == pytest.approx(table.iou.mean())
    assert result.overall.mean_accuracy == pytest.approx(table.top1.mean() / 100)
    for name in ("confusion_matrix.png", "mistakes.png"):
        image = cv2.imread(str(folder / name))
        assert image is not None
        assert min(image.shape[:2]) > 100


def test_the_scores_are_those_of_the_training_run(trained: Place, tmp_path: Path) -> None:
    saved = best(trained)
    result = run_on(trained.load().config, saved, tmp_path / "out")
    assert result.epoch == saved.epoch
    assert result.overall.top1 == saved.scores["top1_val"]
    assert result.overall.loss == pytest.approx(saved.scores["loss_val"], rel=1e-6)
    assert result.overall.mean_iou == pytest.approx(saved.scores["mIoU_val"])


def test_batches_change_nothing(trained: Place, tmp_path: Path) -> None:
    saved = best(trained)
    for size in (1, 7, 100):
        config = trained.load(f"TEST.batch_size_test={size}").config
        run_on(config, saved, tmp_path / str(size))
    one, seven, hundred = (
        pd.read_csv(tmp_path / str(size) / "predictions.csv") for size in (1, 7, 100)
    )
    for other in (seven, hundred):
        assert (one.predicted == other.predicted).all()
        np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-4)


def test_top5_among_many_classes(tmp_path: Path) -> None:
    """Per-class and overall top-5 against the network's own logits."""
    root = tmp_path / "data"
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(8):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(3):
                image = generator.integers(0, 256, (40, 40), dtype=np.uint8)
                assert cv2.imwrite(str(folder / f"{number}.png"), image)
    place = Place(tmp_path, root)
    run = place.open("DATA.classes=8", "TRAIN.epochs=1")
    fit(run, FilesOnly(run))
    result = run_on(place.load("DATA.classes=8").config, best(place), tmp_path / "out")
    assert run.val is not None
    model = run.state.model.eval()
    hits = []
    with torch.no_grad():
        for batch in run.val:
            logits, targets = model(run.pipe(batch)[0]), batch.targets
            own = logits.gather(1, targets[:, None])
            hits += ((logits > own).sum(1) < 5).tolist()
    assert result.overall.top5 == pytest.approx(100 * np.mean(hits))
    assert 0 < result.overall.top5 < 100
    by_class = np.reshape(hits, (8, 3)).mean(1)
    assert [score.top5 for score in result.per_class] == pytest.approx(100 * by_class)


def test_mistakes_are_drawn_the_most_confident_first(trained: Place, tmp_path: Path) -> None:
    from sanctl.engine.testing import Predictions

    predictions = Predictions(
        numbers=np.arange(5),
        targets=np.array([0, 1, 2, 0, 9]),
        top=np.array([[1, 0], [1, 0], [0, 1], [2, 1], [0, 1]]),
        confidence=np.array([0.5, 0.9, 0.8, 0.6, 1.0], np.float32),
    )
    assert predictions.worst(ignore_label=9).tolist() == [2, 3, 0]


def test_a_network_without_mistakes_has_a_picture_of_none(place: Place, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    (root / "mapping.txt").write_text("".join(f"{k}\t{i}\n" for i, k in enumerate(CLASSES)))
    (root / "val.txt").write_text(
        "".join(f"val/circle/{number}.png\t0\n" for number in range(IMAGES["val"]))
    )
    run = place.open("TRAIN.epochs=1", "TRAIN.evaluate=false")
    with torch.no_grad():
        run.state.model.fc.weight.zero_()
        run.state.model.fc.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    config = place.load(f"DATA.data_root={root}", "DATA.dataset_init=txt_mappings").config
    result = run_on(config, run.checkpoint({}), tmp_path / "out")
    assert result.mistakes == 0
    assert result.overall.top1 == 100
    assert [score.images for score in result.per_class] == [IMAGES["val"], 0, 0]
    assert [score.top5 for score in result.per_class] == [100, 0, 0]
    assert (tmp_path / "out" / "mistakes.png").exists()


def test_the_average_is_tested(place: Place, tmp_path: Path) -> None:
    run = place.open("TRAIN.epochs=2", "TRAIN.ema_decay=0.8", "TRAIN.base_lr=0.2")
    fit(run, FilesOnly(run))
    saved = load_checkpoint(place.model / "train_epoch_2.pth")
    result = run_on(place.load().config, saved, tmp_path / "out")
    assert result.overall.loss == pytest.approx(saved.scores["loss_val"], rel=1e-6)


def test_a_file_name_that_is_not_valid_text(trained: Place, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    odd = os.fsdecode(b"caf\xe9.png")
    (root / "val" / "cross" / "0.png").rename(root / "val" / "cross" / odd)
    config = trained.load(f"DATA.data_root={root}").config
    run_on(config, best(trained), tmp_path / "out")
    assert b"caf\xe9.png" in (tmp_path / "out" / "predictions.csv").read_bytes()


def test_other_classes_than_the_checkpoints_are_refused(trained: Place, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    for split in ("train", "val", "test"):
        (root / split / "cross").rename(root / split / "plus")
    config = trained.load(f"DATA.data_root={root}").config
    with pytest.raises(UserError, match=r"x\.pth: .*class 1 is 'cross' .* and 'plus' in the data"):
        run_on(config, best(trained), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_number_of_classes_is_refused(trained: Place, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    for split in ("train", "val"):
        for path in (root / split / "cross").iterdir():
            path.unlink()
        (root / split / "cross").rmdir()
    config = trained.load(f"DATA.data_root={root}", "DATA.classes=2").config
    with pytest.raises(UserError, match="trained on 3 classes, but the images have 2"):
        run_on(config, best(trained), tmp_path / "out")
    bare = Checkpoint(best(trained).state_dict)
    with pytest.raises(UserError, match=r"x\.pth: .*fc\.weight 3x64 instead of 2x64"):
        run_on(config, bare, tmp_path / "out")


def test_another_network_is_refused_by_its_tensors(trained: Place, tmp_path: Path) -> None:
    config = trained.load("TRAIN.sa_type=1").config
    with pytest.raises(UserError, match=r"x\.pth: .*unexpected .*sam\.conv_p") as caught:
        run_on(config, best(trained), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_unreadable_image_is_named(trained: Place, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data")
    path = root / "val" / "cross" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError) as caught:
        run_on(trained.load(f"DATA.data_root={root}").config, best(trained), tmp_path / "out")
    assert str(path) in str(caught.value)
