"""Runs that end early and go on: what comes out is what an uninterrupted run gives."""

import os
import re
import signal
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from interrupted import LAST, assert_same_end, go_on, interrupt, train
from process_session import python
from tiny_run import FilesOnly, Place, environment

from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import InterruptedRunError
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


def start(place: Place, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    command = "-m", "sanctl", "train", "shapes", "tiny", "--no-test", *arguments
    return python(*command, folder=place.folder, variables=environment())


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
    with start(place, *options(keys)) as process:
        wait_for_line(process, "train epoch=2 epochs=3 step=5 ")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert (place.model / "train_epoch_1.pth").exists()
    assert not (place.model / LAST).exists()
    go_on(place, *keys)
    assert_same_end(place)


def test_ctrl_c_on_a_real_process(place: Place) -> None:
    with start(place, *options(LONG)) as process:
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
    with start(place, *options(LONG)) as process:
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
