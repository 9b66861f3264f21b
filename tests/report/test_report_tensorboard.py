"""TensorBoard events, read back with TensorBoard's own reader."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sanctl.report.tensorboard import TensorBoardReporter

Play = Callable[..., None]
Values = Callable[..., dict[str, float]]

SCORES = ("loss", "top1", "top5", "mIoU", "mAcc", "allAcc")
TAGS = {f"{score}_{part}" for score in SCORES for part in ("train", "val")} | {"learning_rate"}


def read(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> epoch -> value of every event that TensorBoard shows for a folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_the_original_tags_over_epochs(play: Play, epoch_values: Values, tmp_path: Path) -> None:
    play(TensorBoardReporter(tmp_path / "run", pytest.fail), tmp_path)

    shown = read(tmp_path / "run")
    assert set(shown) == TAGS
    for tag, values in shown.items():
        column = "lr" if tag == "learning_rate" else tag
        expected = {epoch: epoch_values(epoch)[column] for epoch in range(1, 13)}
        assert values == pytest.approx(expected, rel=1e-6)


def test_a_resume_replaces_the_epochs_that_it_does_again(
    play: Play, epoch_values: Values, tmp_path: Path
) -> None:
    play(TensorBoardReporter(tmp_path, pytest.fail), tmp_path, last=5)
    play(TensorBoardReporter(tmp_path, pytest.fail), tmp_path, first=3, last=4, shift=1.0)

    losses = {e: epoch_values(e, 0.0 if e < 3 else 1.0)["loss_val"] for e in range(1, 5)}
    assert read(tmp_path)["loss_val"] == pytest.approx(losses, rel=1e-6)


def test_each_epoch_is_on_disk_before_the_run_ends(play: Play, tmp_path: Path) -> None:
    seen: list[int] = []

    def look(epoch: int, step: int) -> None:
        if epoch > 1 and step == 1:
            seen.append(len(read(tmp_path)["loss_train"]))

    play(TensorBoardReporter(tmp_path, pytest.fail), tmp_path, last=3, at_step=look)
    assert seen == [1, 2]


def test_a_folder_that_cannot_be_written_warns_and_loses_nothing(
    play: Play, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.write_text("a file where the folder should be")
    warnings: list[str] = []

    def mend(epoch: int, step: int) -> None:
        if (epoch, step) == (3, 1):
            folder.unlink()

    play(TensorBoardReporter(folder, warnings.append), tmp_path, last=4, at_step=mend)

    assert len(warnings) == 1  # for two epochs
    assert "training goes on" in warnings[0]
    assert sorted(read(folder)["top1_val"]) == [1, 2, 3, 4]
