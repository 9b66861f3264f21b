"""Which checkpoint a run goes on from, with which settings, and what it refuses to go on with."""

from pathlib import Path

import pytest
import torch
from interrupted import LAST, assert_same_end, go_on, interrupt, train
from killed_run import flat
from tiny_run import FilesOnly, Place, write_dataset

from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.fit import fit
from sanctl.errors import UserError


def test_a_finished_run_has_nothing_left_to_do(place: Place) -> None:
    train(place, exp="exp/shapes/tiny")
    before = {path: path.read_bytes() for path in place.model.iterdir()}
    rows = (place.run / "metrics.csv").read_text()
    run = place.open(resume="auto")
    reporter, notes = FilesOnly(run), list[str]()
    reporter.note = notes.append
    summary = fit(run, reporter)
    assert notes == ["nothing left to train: epoch 3 is done, TRAIN.epochs is 3"]
    assert summary.best_epoch is not None
    assert {path: path.read_bytes() for path in place.model.iterdir()} == before
    assert (place.run / "metrics.csv").read_text() == rows


def test_a_finished_run_goes_on_to_more_epochs(place: Place) -> None:
    train(place, "TRAIN.epochs=2", exp="exp/shapes/tiny")
    go_on(place, "TRAIN.epochs=4")
    lines = (place.run / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]


def test_resuming_from_a_path_in_another_folder(place: Place) -> None:
    train(place)
    interrupt(place, at=(2, 2, True))
    path = place.model / "train_epoch_1.pth"
    run = place.open(resume=str(path), exp="again")
    fit(run, FilesOnly(run))
    ours = load_checkpoint(place.folder / "again" / "model" / LAST).state_dict
    expected = load_checkpoint(place.folder / "whole" / "model" / LAST).state_dict
    assert flat(dict(ours)) == flat(dict(expected))


def test_resuming_behind_later_checkpoints_is_refused(place: Place) -> None:
    train(place, exp="exp/shapes/tiny")
    with pytest.raises(UserError, match=r"later than .*train_epoch_2\.pth"):
        place.open(resume=str(place.model / "train_epoch_2.pth"))


def test_auto_without_a_checkpoint_starts_afresh(place: Place) -> None:
    run = place.open(resume="auto")
    assert run.state.epoch == 0
    assert any("starting afresh" in note for note in run.notes)


def test_auto_takes_the_one_before_a_damaged_checkpoint(place: Place) -> None:
    train(place)
    interrupt(place, at=(3, 2, True))
    newest = place.model / "train_epoch_3_step_2.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    run = place.open(resume="auto")
    assert run.state.epoch == 2
    assert any(str(newest) in note for note in run.notes)
    fit(run, FilesOnly(run))
    assert_same_end(place)


def test_auto_says_what_it_takes_when_a_bit_has_flipped(place: Place) -> None:
    train(place)
    train(place, exp="exp/shapes/tiny")
    newest, before = place.model / "train_epoch_3.pth", place.model / "train_epoch_2.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run = place.open(resume="auto")
    assert run.state.epoch == 2
    refused, taken = (note for note in run.notes if str(place.model) in note)
    assert refused.startswith(f"{newest}: damaged since it was written: its checksum")
    assert taken == f"{before}: going on from this one, the newest that can be read"
    fit(run, FilesOnly(run))
    assert_same_end(place)


def test_auto_falls_back_on_the_best_checkpoint(place: Place) -> None:
    run = place.open("TRAIN.save_freq=100", "TRAIN.epochs=1")
    fit(run, FilesOnly(run))
    (place.model / "train_epoch_1.pth").unlink()
    assert place.open(resume="auto").state.epoch == 1


def test_nothing_is_overwritten_when_no_checkpoint_can_be_read(place: Place) -> None:
    train(place, "TRAIN.epochs=1", exp="exp/shapes/tiny")
    for path in place.model.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="none of its 2 checkpoints can be read"):
        place.open(resume="auto")


def test_a_run_is_not_written_over(place: Place) -> None:
    train(place, "TRAIN.epochs=1", exp="exp/shapes/tiny")
    with pytest.raises(UserError, match="--resume auto"):
        place.open()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("TRAIN.optimizer=adamw", r"TRAIN\.optimizer"),
        ("TRAIN.widths=[32, 64, 32]", "of another shape"),
        ("TRAIN.layers=[1, 1, 2]", "missing"),
        ("TRAIN.batch_size=5", r"TRAIN\.batch_size 4, now it is 5"),
        ("TRAIN.manual_seed=8", r"TRAIN\.manual_seed 7, now it is 8"),
    ],
)
def test_resuming_as_another_run_is_one_line(place: Place, change: str, reason: str) -> None:
    interrupt(place, at=(2, 2, True))
    with pytest.raises(UserError, match=reason) as caught:
        place.open(change, resume="auto")
    assert "\n" not in str(caught.value)
    assert "train_epoch_2_step_2.pth" in str(caught.value)


def test_the_learning_rate_may_change_in_the_middle_of_an_epoch(place: Place) -> None:
    interrupt(place, at=(2, 2, True))
    run = place.open("TRAIN.base_lr=0.001", "TRAIN.epochs=2", resume="auto")
    fit(run, FilesOnly(run))
    assert run.state.lr == pytest.approx(0.0005)


def test_resuming_on_other_classes_is_refused(place: Place, tmp_path: Path) -> None:
    train(place, "TRAIN.epochs=1", exp="exp/shapes/tiny")
    root = write_dataset(tmp_path / "data")
    for split in ("train", "val"):
        (root / split / "cross").rename(root / split / "plus")
    with pytest.raises(UserError, match="class 1 is 'cross' in the checkpoint and 'plus' in"):
        place.open(f"DATA.data_root={root}", resume="auto")


def test_resuming_with_fewer_images_in_the_middle_of_an_epoch(place: Place, tmp_path: Path) -> None:
    interrupt(place, at=(2, 4, True))
    root = write_dataset(tmp_path / "data")
    for path in (root / "train").glob("*/[3-5].png"):
        path.unlink()
    with pytest.raises(UserError, match=r"after step 4 .* 3 steps now"):
        place.open(f"DATA.data_root={root}", resume="auto")


def test_an_average_can_be_switched_on_and_off_on_resuming(place: Place) -> None:
    train(place, "TRAIN.epochs=1", exp="exp/shapes/tiny")
    run = place.open("TRAIN.ema_decay=0.5", "TRAIN.epochs=2", resume="auto")
    assert run.state.ema is not None
    pairs = zip(
        run.state.ema.module.state_dict().values(),
        run.state.model.state_dict().values(),
        strict=True,
    )
    assert all(torch.equal(average, own) for average, own in pairs)
    fit(run, FilesOnly(run))
    off = place.open(resume="auto")
    assert off.state.ema is None
    fit(off, FilesOnly(off))


# A run that fails half-way
