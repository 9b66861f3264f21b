import json
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_run import Place

from sanctl.config.load import load_config
from sanctl.engine.runfolder import RunFolder
from sanctl.errors import UserError


def touch(folder: RunFolder, *names: str) -> None:
    folder.model.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder.model / name).write_bytes(b"")


def names(folder: RunFolder) -> list[str]:
    return [path.name for path in folder.checkpoints()]


def test_checkpoints_come_in_training_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    ordered = [
        "train_epoch_2.pth",
        "train_epoch_9.pth",
        "train_epoch_10_step_7.pth",
        "train_epoch_10_step_20.pth",
        "train_epoch_10.pth",
        "train_epoch_11_step_1.pth",
    ]
    others = ["model_best.pth", "train_epoch_x.pth", "train_epoch_12.pth.bak", ".train_epoch_9.tmp"]
    touch(folder, *reversed(ordered), *others)
    assert names(folder) == ordered
    assert folder.resumable() == [folder.best, *folder.checkpoints()]


def test_names_are_those_of_the_original(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.checkpoint(3) == tmp_path / "model" / "train_epoch_3.pth"
    assert folder.checkpoint(4, 17) == tmp_path / "model" / "train_epoch_4_step_17.pth"
    assert folder.best == tmp_path / "model" / "model_best.pth"
    touch(folder, folder.checkpoint(4, 17).name, folder.checkpoint(3).name)
    assert folder.checkpoints() == [folder.checkpoint(3), folder.checkpoint(4, 17)]


def test_prune_keeps_the_newest_two_and_the_best(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    touch(folder, "train_epoch_9.pth", "train_epoch_10.pth", "train_epoch_11_step_2.pth")
    touch(folder, "train_epoch_8.pth", "model_best.pth", "notes.txt")
    folder.prune()
    assert {path.name for path in folder.model.iterdir()} == {
        "train_epoch_10.pth",
        "train_epoch_11_step_2.pth",
        "model_best.pth",
        "notes.txt",
    }


def test_a_folder_without_checkpoints_is_free(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.refuse_if_used()
    folder.model.mkdir()
    (folder.root / "config.yaml").write_text("")
    folder.refuse_if_used()
    folder.prune()
    assert folder.checkpoints() == []


@pytest.mark.parametrize(
    "name", ["train_epoch_1.pth", "train_epoch_1_step_3.pth", "model_best.pth"]
)
def test_a_folder_with_a_run_is_refused(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    touch(folder, name)
    with pytest.raises(UserError, match=rf"{name}.*--resume auto.*TRAIN\.save_path"):
        folder.refuse_if_used()


def test_going_on_behind_later_checkpoints_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    touch(folder, "train_epoch_3.pth", "train_epoch_4_step_2.pth", "model_best.pth")
    folder.refuse_if_ahead(folder.best, 4, 2)
    folder.refuse_if_ahead(folder.best, 4, None)
    for epoch, step in ((3, None), (4, 1), (2, 9)):
        with pytest.raises(UserError, match=r"train_epoch_4_step_2\.pth.*TRAIN\.save_path"):
            folder.refuse_if_ahead(folder.best, epoch, step)


def test_prepare_records_the_configuration_and_the_environment(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    loaded = place.load("TRAIN.epochs=2")
    folder = RunFolder(loaded.run_dir)
    folder.prepare(loaded.config, torch.device("cpu"))
    assert load_config(folder.root / "config.yaml").config == loaded.config
    environment = json.loads((folder.root / "env.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["git"] is None
    assert {"time", "command", "sanctl", "python", "platform", "cuda", "gpus"} <= set(environment)


def test_what_killed_runs_have_left_goes_at_the_next_start(place: Place) -> None:
    loaded = place.load()
    folder = RunFolder(loaded.run_dir)
    left = [".model_best.pth.0123abcd.tmp", ".train_epoch_3.pth.ffffffff.tmp"]
    others = [".x.tmp", "train_epoch_3.pth", "x.0123abcd.tmp", ".model_best.pth.0123abcd.tmp2"]
    touch(folder, *left, *others)
    (folder.root / ".env.json.89abcdef.tmp").touch()
    folder.prepare(loaded.config, torch.device("cpu"))
    assert {path.name for path in folder.model.iterdir()} == set(others)
    names = {path.name for path in folder.root.iterdir()}
    assert names == {"model", "config.yaml", "env.json"}


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("auto", "the kernels need a CUDA device, not cpu"), ("torch", "asked for")],
)
def test_what_runs_the_operators_is_recorded(
    place: Place, monkeypatch: pytest.MonkeyPatch, variable: str, reason: str
) -> None:
    monkeypatch.setenv("SANCTL_OPS_BACKEND", variable)
    loaded = place.load()
    folder = RunFolder(loaded.run_dir)
    folder.prepare(loaded.config, torch.device("cpu"))
    environment = json.loads((folder.root / "env.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["operators"] == {"backend": "torch", "reason": reason}
    names = environment["cupy"].keys()
    assert all(version(name) == environment["cupy"][name] for name in names)
    assert bool(names) == (find_spec("cupy") is not None)


def test_the_commit_of_the_users_folder_is_recorded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(
        ["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True
    )
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    loaded = place.load()
    folder = RunFolder(loaded.run_dir)
    folder.prepare(loaded.config, torch.device("cpu"))
    assert json.loads((folder.root / "env.json").read_text())["git"] == head
