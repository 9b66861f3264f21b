"""What a run says of the disk before it starts, and what it does on one that is full."""

import re
from pathlib import Path

import pytest
import torch
from small_disk import available, on_small_disk
from tiny_run import FilesOnly, Place
from torch import nn

from sanctl.config.schema import TrainConfig
from sanctl.engine.fit import fit
from sanctl.engine.room import checkpoint_size, describe_room
from sanctl.engine.runfolder import RunFolder


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a small file system may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not available(folder):
        pytest.skip("no tmpfs may be mounted here (unshare -rm)")
    return folder


def test_a_full_disk_ends_a_run_and_leaves_its_checkpoints(disk: Path, shapes: Path) -> None:
    found = on_small_disk("save", disk, shapes)
    assert found["statuses"] == [0, 1, 0]
    (error,) = found["error"].splitlines()
    assert error.startswith("error: cannot write exp/shapes/tiny/model/")
    assert "No space left on device" in error
    assert f"free space in {disk}/exp/shapes/tiny/model" in error
    (note,) = found["notes"]
    assert note.endswith("too little; free space, or choose another folder")
    assert found["intact"]
    assert [row.split(",")[0] for row in found["rows"]] == ["1", "2"]


def test_training_goes_on_where_logs_cannot_be_written(disk: Path, shapes: Path) -> None:
    found = on_small_disk("log", disk, shapes)
    assert found["trained"] == found["rows"] == found["saved"] == found["epochs"]
    for part in (r"metrics\.csv", "TensorBoard", r"train\.log"):
        (warning,) = [line for line in found["warnings"] if re.search(part, line)]
        assert "No space left on device" in warning
    assert len(found["warnings"]) == 3
    assert " done " in found["log"]


@pytest.mark.parametrize(
    "change",
    [
        (),
        ("TRAIN.optimizer=adamw", "TRAIN.ema_decay=0.9"),
        ("TRAIN.momentum=0",),
        ("TRAIN.evaluate=false",),
    ],
)
def test_the_estimate_is_what_a_run_comes_to_write(place: Place, change: tuple[str, ...]) -> None:
    run = place.open("TRAIN.epochs=1", "TRAIN.widths=[128,256,256]", *change)
    expected = checkpoint_size(run.state.model, run.config.TRAIN)
    fit(run, FilesOnly(run))
    written = (place.model / "train_epoch_1.pth").stat().st_size
    assert expected <= written <= 1.3 * expected


def test_the_note_counts_what_is_there(tmp_path: Path) -> None:
    model, folder = nn.Linear(256, 1024, bias=False), RunFolder(tmp_path / "exp" / "x")
    train = TrainConfig(model="resnet26", momentum=0)
    assert checkpoint_size(model, train) == 2**20
    note = describe_room(folder, model, train)
    assert note.startswith("disk: checkpoints will take up to 4.0 MiB, ")
    assert note.endswith(f" are free in {tmp_path}")
    without = train.model_copy(update={"evaluate": False})
    assert "up to 3.0 MiB" in describe_room(folder, model, without)
    folder.model.mkdir(parents=True)
    folder.best.write_bytes(bytes(2**20))
    folder.checkpoint(3).write_bytes(bytes(2**20))
    assert "up to 2.0 MiB" in describe_room(folder, model, train)


def test_a_network_larger_than_the_disk_is_told(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(2**24, 2**24)
    note = describe_room(RunFolder(tmp_path), model, TrainConfig(model="resnet26"))
    assert "up to 8192.0 TiB" in note
    assert note.endswith("too little; free space, or choose another folder")
