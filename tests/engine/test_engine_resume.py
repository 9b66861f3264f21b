"""Runs that end early and go on: what comes out is what an uninterrupted run gives."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_run import flat
from tiny_run import FilesOnly, Place, ctrl_c_at, environment, write_dataset

from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import InterruptedRunError
from sanctl.errors import UserError
from sanctl.report.records import StepRecord

EVERYTHING = (
    "TRAIN.mixup_alpha=0.4",
    "TRAIN.ema_decay=0.7",
    "TRAIN.accumulate=2",
    "TRAIN.clip_grad=1",
    "TRAIN.optimizer=adamw",
    "TRAIN.base_lr=0.01",
    "TRAIN.warmup_epochs=1",
)
LAST = "train_epoch_3.pth"


def train(place: Place, *overrides: str, exp: str = "whole") -> None:
    run = place.open(*overrides, exp=exp)
    fit(run, FilesOnly(run))


def interrupt(
    place: Place, *overrides: str, at: tuple[int, int, bool], resume: str | None = None
) -> str:
    """Train until Ctrl-C is pressed at (epoch, step, whether in training); return the message."""
    run = place.open(*overrides, resume=resume)
    before = signal.getsignal(signal.SIGINT)
    message = None
    try:
        fit(run, FilesOnly(run, ctrl_c_at(*at)))
    except InterruptedRunError as error:  # no pytest.raises, which keeps the run's workers alive
        message = str(error)
    assert signal.getsignal(signal.SIGINT) is before
    assert message is not None
    return message


def go_on(place: Place, *overrides: str, resume: str = "auto") -> None:
    run = place.open(*overrides, resume=resume)
    fit(run, FilesOnly(run))


def assert_same_end(place: Place, whole: str = "whole") -> None:
    """The resumed run's files are those of the uninterrupted one, bit for bit."""
    expected_folder = place.folder / whole
    for name in (LAST, "model_best.pth"):
        ours = vars(load_checkpoint(place.model / name))
        expected = vars(load_checkpoint(expected_folder / "model" / name))
        for content in (ours, expected):
            content["config"]["TRAIN"].pop("save_path")
        assert flat(ours) == flat(expected)
    assert (place.run / "metrics.csv").read_text() == (expected_folder / "metrics.csv").read_text()


@pytest.mark.parametrize(
    "at",
    [(2, 1, True), (2, 5, True), (1, 3, True), (3, 4, True), (2, 1, False), (3, 3, False)],
    ids=lambda at: f"epoch{at[0]}-step{at[1]}-{'train' if at[2] else 'val'}",
)
def test_ctrl_c_saves_and_the_run_goes_on_bit_for_bit(
    place: Place, at: tuple[int, int, bool]
) -> None:
    train(place)
    message = interrupt(place, at=at)
    epoch, step, training = at
    step = step if training else 5
    saved = place.model / f"train_epoch_{epoch}_step_{step}.pth"
    assert message == f"interrupted after epoch {epoch}, step {step}; saved {saved}"
    assert (load_checkpoint(saved).epoch, load_checkpoint(saved).step) == (epoch, step)
    go_on(place)
    assert_same_end(place)


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_switched_on_goes_on_bit_for_bit(place: Place, workers: int) -> None:
    keys = (*EVERYTHING, f"TRAIN.workers={workers}")
    train(place, *keys)
    interrupt(place, *keys, at=(1, 2, True))
    interrupt(place, *keys, at=(2, 4, True), resume="auto")
    go_on(place, *keys)
    assert_same_end(place)


def test_ctrl_c_between_two_epochs(place: Place) -> None:
    """Pressed when nothing looks for it any more, and the epoch is not due to be saved."""
    train(place, "TRAIN.save_freq=3")
    run = place.open("TRAIN.save_freq=3")
    reporter = FilesOnly(run)
    write = reporter.epoch_finished

    def press(record: Any) -> None:
        write(record)
        signal.raise_signal(signal.SIGINT)

    reporter.epoch_finished = press
    with pytest.raises(InterruptedRunError, match=r"after epoch 1; saved .*train_epoch_1\.pth"):
        fit(run, reporter)
    go_on(place, "TRAIN.save_freq=3")
    assert_same_end(place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_saves_too(place: Place, number: signal.Signals) -> None:
    def on_step(record: StepRecord, training: bool) -> None:
        if (record.epoch, record.step, training) == (1, 2, True):
            signal.raise_signal(number)
            signal.raise_signal(number)  # some send it again

    run = place.open()
    with pytest.raises(InterruptedRunError, match=r"after epoch 1, step 2; saved ") as caught:
        fit(run, FilesOnly(run, on_step))
    assert caught.value.exit_status == 128 + number
    train(place)
    go_on(place)
    assert_same_end(place)


def test_a_second_ctrl_c_stops_at_once(place: Place) -> None:
    train(place, "TRAIN.epochs=1", exp="exp/shapes/tiny")
    before = {path: path.read_bytes() for path in place.model.iterdir()}

    def press_twice(record: StepRecord, training: bool) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    run = place.open(resume="auto")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(run, FilesOnly(run, press_twice))
    assert signal.getsignal(signal.SIGINT) is handler
    assert {path: path.read_bytes() for path in place.model.iterdir()} == before


def start(place: Place, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sanctl", "train", "shapes", "tiny", "--no-test", *arguments]
    return subprocess.Popen(
        command,
        cwd=place.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a test can end it together with its workers
    )


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    assert process.stderr is not None
    pytest.fail(f"ended without the line {beginning!r}: {process.stderr.read()}")


# Steps that take a while, so that a signal sent at one arrives before the last one.
LONG = ("TRAIN.batch_size=1", "TRAIN.print_freq=1", "TRAIN.workers=2")


def options(keys: tuple[str, ...]) -> list[str]:
    return [word for key in keys for word in ("-o", key)]


def test_a_killed_run_goes_on_bit_for_bit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    keys = (*LONG, "TRAIN.ema_decay=0.7")
    train(place, *keys)
    process = start(place, *options(keys))
    wait_for_line(process, "train epoch=2 epochs=3 step=5 ")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (place.model / "train_epoch_1.pth").exists()
    assert not (place.model / LAST).exists()
    go_on(place, *keys)
    assert_same_end(place)


def test_ctrl_c_on_a_real_process(place: Place) -> None:
    process = start(place, *options(LONG))
    wait_for_line(process, "train epoch=2 epochs=3 step=3 ")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (line,) = err.splitlines()
    assert re.match(r"interrupted after epoch [23], step \d+; saved ", line)
    expected = "sanctl train shapes tiny " + " ".join(options(LONG)) + " --resume auto"
    assert line.endswith(f"; go on with: {expected}")
    (saved,) = place.model.glob("train_epoch_*_step_*.pth")
    assert f"saved {saved.relative_to(place.folder)};" in line
    status, _, err = place.main(
        "train", "shapes", "tiny", "--no-test", *options(LONG), "--resume=auto"
    )
    assert status == 0, err
    train(place, *LONG)
    assert_same_end(place)


def test_two_ctrl_c_on_a_real_process(place: Place) -> None:
    process = start(place, *options(LONG))
    wait_for_line(process, "train epoch=1 epochs=3 step=2 ")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.002)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = err.splitlines()
    assert line.startswith("interrupted ")
    assert "--resume auto" in line
    assert not [path for path in place.model.iterdir() if path.name.startswith(".")]


# Where to go on from


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


def test_a_run_that_dies_between_its_two_checkpoints_loses_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dying between the best and the epoch's checkpoint, or between report and checkpoint."""
    train(place)

    def die_at(number: int) -> None:
        save, calls = Checkpoint.save, [0]

        def dying(self: Checkpoint, path: Path) -> None:
            calls[0] += 1
            if calls[0] == number:
                raise RuntimeError("killed")
            save(self, path)

        monkeypatch.setattr(Checkpoint, "save", dying)
        run = place.open(resume="auto")
        with pytest.raises(RuntimeError, match="killed"):
            fit(run, FilesOnly(run))
        monkeypatch.setattr(Checkpoint, "save", save)

    for number in (1, 2, 3):
        die_at(number)
    go_on(place)
    assert_same_end(place)
