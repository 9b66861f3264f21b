import functools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import CLASSES, IMAGES, FilesOnly, Place
from torchvision.transforms.v2 import functional as F

from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.engine.fit import fit
from sanctl.engine.optim import learning_rate
from sanctl.engine.resume import Start
from sanctl.engine.run import build_network
from sanctl.errors import SanctlError, UserError
from sanctl.report.create import create_reporter
from sanctl.report.records import RunSummary

SCORES = ["loss", "top1", "top5", "mIoU", "mAcc", "allAcc"]


def train(place: Place, *overrides: str, exp: str = "exp/shapes/tiny") -> RunSummary:
    run = place.open(*overrides, exp=exp)
    return fit(run, FilesOnly(run))


def evaluate(saved: Checkpoint, place: Place, weights: Mapping[str, torch.Tensor]) -> list[float]:
    """Loss and top-1 of weights over the validation images, written out by hand."""
    config = place.load().config
    model = build_network(config)
    model.load_state_dict(dict(weights))
    model.eval()
    losses, hits = [], []
    root = Path(config.DATA.data_root)
    for target, kind in enumerate(CLASSES):
        for path in sorted((root / "val" / kind).iterdir()):
            image = torch.from_numpy(np.array(Image.open(path)))[None]
            pixels = F.center_crop(F.resize(image, [36], antialias=True), [32]) / 255
            with torch.no_grad():
                logits = model(((pixels - 0.1307) / 0.3081)[None])[0]
            losses.append(-float(logits.log_softmax(0)[target]))
            hits.append(int(logits.argmax()) == target)
    return [float(np.mean(losses)), 100 * float(np.mean(hits))]


def test_a_run_leaves_what_a_user_expects(place: Place, shapes: Path) -> None:
    run = place.open()
    reporter = create_reporter(run.folder.root, run.config.TRAIN.print_freq)
    summary = fit(run, reporter)
    reporter.close()
    table = pd.read_csv(place.run / "metrics.csv")
    assert list(table.columns) == [
        "epoch", "lr", *(f"{name}_{split}" for split in ("train", "val") for name in SCORES)
    ]  # fmt: skip
    assert table.epoch.tolist() == [1, 2, 3]
    assert table.lr.tolist() == [learning_rate(run.config.TRAIN, epoch) for epoch in (1, 2, 3)]
    assert {path.name for path in place.model.iterdir()} == {
        "train_epoch_2.pth",
        "train_epoch_3.pth",
        "model_best.pth",
    }
    best = table.iloc[table.top1_val.to_numpy().argmax()]  # the first of the best
    assert (summary.best_epoch, summary.best_top1) == (best.epoch, best.top1_val)
    saved = load_checkpoint(place.model / "model_best.pth")
    assert (saved.epoch, saved.best_epoch, saved.best_score) == (
        best.epoch, best.epoch, best.top1_val
    )  # fmt: skip
    assert saved.scores == pytest.approx(dict(best))
    assert saved.classes == CLASSES
    assert (saved.dataset, saved.name) == ("shapes", "tiny")

    events = EventAccumulator(str(place.run))
    events.Reload()
    for name in SCORES:
        for split in ("train", "val"):
            found = [event.value for event in events.Scalars(f"{name}_{split}")]
            assert found == pytest.approx(table[f"{name}_{split}"].tolist(), rel=1e-6)


def test_scores_are_those_of_the_saved_weights(place: Place) -> None:
    train(place)
    table = pd.read_csv(place.run / "metrics.csv")
    for name in ("train_epoch_2.pth", "train_epoch_3.pth", "model_best.pth"):
        saved = load_checkpoint(place.model / name)
        row = table[table.epoch == saved.epoch].iloc[0]
        loss, top1 = evaluate(saved, place, saved.state_dict)
        assert row.loss_val == pytest.approx(loss, rel=1e-5)
        assert row.top1_val == pytest.approx(top1)


def test_with_an_average_the_scores_are_those_of_the_average(place: Place) -> None:
    train(place, "TRAIN.ema_decay=0.5", "TRAIN.base_lr=0.2")
    saved = load_checkpoint(place.model / "train_epoch_3.pth")
    row = pd.read_csv(place.run / "metrics.csv").iloc[2]
    loss, top1 = evaluate(saved, place, saved.weights())
    assert row.loss_val == pytest.approx(loss, rel=1e-5)
    assert row.top1_val == pytest.approx(top1)
    assert evaluate(saved, place, saved.state_dict)[0] != pytest.approx(loss, rel=1e-3)


def test_every_training_image_counts_once_an_epoch(place: Place) -> None:
    seen: list[int] = []
    run = place.open("TRAIN.epochs=1")
    pipe = run.pipe

    def counting(batch):  # type: ignore[no-untyped-def]
        seen.extend(batch.indices.tolist())
        return pipe(batch)

    run.pipe = counting
    run.val = None
    fit(run, FilesOnly(run))
    assert sorted(seen) == list(range(IMAGES["train"] * len(CLASSES)))


def test_training_learns(place: Place) -> None:
    keys = ("TRAIN.optimizer=adamw", "TRAIN.base_lr=0.01", "TRAIN.sa_type=1")
    summary = train(place, "TRAIN.epochs=20", *keys)
    assert summary.best_top1 is not None
    assert summary.best_top1 > 70  # chance is 33
    losses = pd.read_csv(place.run / "metrics.csv").loss_train
    assert losses[-5:].mean() < 0.9 * losses[0]


def test_the_same_seed_gives_the_same_run_whatever_the_workers(place: Place) -> None:
    for exp, workers in (("a", 0), ("b", 2)):
        train(place, "TRAIN.epochs=2", f"TRAIN.workers={workers}", exp=exp)
    a, b = (place.folder / exp for exp in ("a", "b"))
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    one, other = (load_checkpoint(f / "model" / "train_epoch_2.pth").state_dict for f in (a, b))
    assert all(torch.equal(one[key], other[key]) for key in one)
    train(place, "TRAIN.epochs=2", "TRAIN.manual_seed=8", exp="c")
    assert (place.folder / "c" / "metrics.csv").read_text() != (a / "metrics.csv").read_text()


def test_a_run_without_a_seed_draws_and_records_one(place: Place) -> None:
    run = place.open("TRAIN.manual_seed=null", "TRAIN.epochs=1")
    assert any(f"TRAIN.manual_seed={run.seed}" in note for note in run.notes)
    fit(run, FilesOnly(run))
    resumed = place.open("TRAIN.manual_seed=null", "TRAIN.epochs=2", resume="auto")
    assert resumed.seed == run.seed
    assert f"manual_seed: {run.seed}" in (place.run / "config.yaml").read_text()


def test_channels_last_and_compile_give_the_same_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of torch.compile but its C++ code, which takes minutes to build on a CPU.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    # A single step: over more, batch normalisation of so few images blows rounding up.
    keys = ("TRAIN.epochs=1", "TRAIN.base_lr=0.01", "TRAIN.batch_size=18")
    train(place, *keys, exp="plain")
    plain = pd.read_csv(place.folder / "plain" / "metrics.csv")
    for key in ("channels_last", "compile"):
        train(place, *keys, f"TRAIN.{key}=true", exp=key)
        found = pd.read_csv(place.folder / key / "metrics.csv")
        np.testing.assert_allclose(found.loss_train, plain.loss_train, rtol=1e-5)
        np.testing.assert_allclose(found.loss_val, plain.loss_val, rtol=1e-3)
        assert (
            load_checkpoint(place.folder / key / "model" / "model_best.pth").state_dict.keys()
            == load_checkpoint(
                place.folder / "plain" / "model" / "model_best.pth"
            ).state_dict.keys()
        )


def test_amp_on_a_cpu_is_said_to_have_no_effect(place: Place) -> None:
    assert any("TRAIN.amp" in note for note in place.open("TRAIN.amp=true").notes)


def test_save_freq_leaves_epochs_out_but_not_the_last(place: Place) -> None:
    train(place, "TRAIN.epochs=5", "TRAIN.save_freq=2")
    names = {path.name for path in place.model.glob("train_*")}
    assert names == {"train_epoch_4.pth", "train_epoch_5.pth"}


def test_without_evaluation_there_is_no_best(place: Place) -> None:
    summary = train(place, "TRAIN.evaluate=false", "TRAIN.epochs=2")
    assert summary.best_epoch is None
    columns = pd.read_csv(place.run / "metrics.csv").columns
    assert not [name for name in columns if name.endswith("_val")]
    assert {path.name for path in place.model.iterdir()} == {
        "train_epoch_1.pth",
        "train_epoch_2.pth",
    }


def test_without_evaluation_no_validation_images_are_needed(place: Place, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "train").symlink_to(Path(place.load().config.DATA.data_root) / "train")
    place.open("TRAIN.evaluate=false", f"DATA.data_root={root}")
    with pytest.raises(UserError, match="val"):
        place.open(f"DATA.data_root={root}")


# Divergence


def test_a_loss_that_is_not_finite_stops_the_run_there(place: Place) -> None:
    run = place.open("TRAIN.base_lr=1e20")
    with pytest.raises(SanctlError) as caught:
        fit(run, FilesOnly(run))
    message = str(caught.value)
    assert caught.value.exit_status == 1
    assert "the loss is " in message
    assert "epoch 1, step " in message
    assert "learning rate 1e+20" in message
    assert "\n" not in message
    assert list(place.model.iterdir()) == []


def test_the_best_before_a_divergence_is_intact(place: Place) -> None:
    train(place, "TRAIN.epochs=2")
    before = {path: path.read_bytes() for path in place.model.iterdir()}
    run = place.open("TRAIN.epochs=4", "TRAIN.base_lr=1e20", resume="auto")
    with pytest.raises(SanctlError, match="epoch 3, step "):
        fit(run, FilesOnly(run))
    assert {path: path.read_bytes() for path in place.model.iterdir()} == before


@pytest.mark.parametrize("evaluate", ["true", "false"])
def test_weights_that_the_last_step_ruined_are_not_saved(place: Place, evaluate: str) -> None:
    # One step an epoch: its loss is finite, what the step makes of the weights is not.
    run = place.open("TRAIN.batch_size=64", "TRAIN.base_lr=1e38", f"TRAIN.evaluate={evaluate}")
    with pytest.raises(SanctlError, match=r"epoch 1, step 1, learning rate 1e\+38"):
        fit(run, FilesOnly(run))
    assert list(place.model.iterdir()) == []


def test_an_epoch_whose_validation_loss_is_not_finite_is_not_the_best(place: Place) -> None:
    # Running statistics that evaluation alone uses, and that training never updates.
    run = place.open("TRAIN.epochs=2")
    for module in run.state.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
            assert module.running_mean is not None
            module.running_mean.fill_(-3e38)  # ReLU lets this through
    summary = fit(run, FilesOnly(run))
    assert summary.best_epoch is None
    assert not run.folder.best.exists()
    assert not np.isfinite(pd.read_csv(run.folder.metrics)["loss_val"]).any()
    assert len(run.folder.checkpoints()) == 2


# Initial weights


def test_initial_weights_are_loaded(place: Place) -> None:
    train(place, "TRAIN.epochs=1")
    path = place.model / "model_best.pth"
    expected = load_checkpoint(path).state_dict
    run = place.open(f"TRAIN.weight={path}", exp="other")
    found = run.state.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert run.state.epoch == 0
    assert not run.state.optimizer.state


def test_initial_weights_without_the_head_fit_other_classes(place: Place, tmp_path: Path) -> None:
    train(place, "TRAIN.epochs=1")
    path = place.model / "model_best.pth"
    expected = load_checkpoint(path).state_dict
    root, two = Path(place.load().config.DATA.data_root), tmp_path / "two"
    for split in ("train", "val"):
        for kind in CLASSES[:2]:
            (two / split).mkdir(parents=True, exist_ok=True)
            (two / split / kind).symlink_to(root / split / kind)
    keys = (f"DATA.data_root={two}", "DATA.classes=2", f"TRAIN.weight={path}")
    with pytest.raises(UserError, match=r"model_best\.pth.*fc\.weight 3x64 instead of 2x64"):
        place.open(*keys, exp="other")
    run = place.open(*keys, "TRAIN.weight_head=false", exp="other")
    found = run.state.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected if key[:3] != "fc.")
    assert found["fc.weight"].shape == (2, 64)


def test_initial_weights_come_from_the_average(place: Place) -> None:
    train(place, "TRAIN.epochs=1", "TRAIN.ema_decay=0.9")
    path = place.model / "model_best.pth"
    found = place.open(f"TRAIN.weight={path}", exp="other").state.model.state_dict()
    average = load_checkpoint(path).weights()
    assert all(torch.equal(found[key], average[key]) for key in average)


def test_a_setting_of_a_checkpoint_without_configuration_is_unknown() -> None:
    assert Start(Checkpoint({}), Path("x")).setting("batch_size") is None


# Bad input


def test_an_image_too_small_for_the_kernels(place: Place) -> None:
    with pytest.raises(UserError, match=r"DATA\.image_size 8.*at least \d+ px"):
        place.open("DATA.image_size=8")


@pytest.mark.parametrize("setting", ["TRAIN.batch_size=17", "TRAIN.accumulate=4"])
def test_a_single_image_that_cannot_be_normalised(place: Place, setting: str) -> None:
    """18 images at 32 px, of which a ResNet leaves 1 x 1; torch would fail in mid-epoch."""
    resnet = ["TRAIN.arch=resnet", "TRAIN.layers=[1,1,1,1]", "TRAIN.epochs=1"]
    resnet += ["TRAIN.sa_type=", "TRAIN.widths=", "TRAIN.kernels="]
    with pytest.raises(UserError, match=r"TRAIN\.batch_size .* normalised alone"):
        place.open(*resnet, setting)
    train(place, *resnet, setting, "DATA.image_size=64", "DATA.resize=64")


def test_a_device_that_is_not_there(place: Place) -> None:
    from sanctl.engine.run import open_run

    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}"):
            open_run(place.load(), device=name, resume=None)


def test_finite_scores_are_reported(place: Place) -> None:
    train(place, "TRAIN.epochs=1")
    row = pd.read_csv(place.run / "metrics.csv").iloc[0]
    assert all(math.isfinite(value) for value in row)
