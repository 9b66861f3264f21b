"""The folder of `sanctl demo`: what it takes, what it refuses, and what it leaves alone.

The whole demo runs in tests/test_wheel.py.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sanctl.cli.demo import MADE, MARKER, prepare_folder, story
from sanctl.cli.main import app
from sanctl.errors import UserError


def sanctl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sanctl", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("exists", [False, True])
def test_takes_a_new_or_an_empty_folder(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "a" / "demo"
    if exists:
        folder.mkdir(parents=True)
    assert prepare_folder(folder) == []
    assert [path.name for path in folder.iterdir()] == [MARKER]


def test_a_second_demo_replaces_what_the_first_made_and_nothing_else(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "demo")
    mine = ["notes.txt", "dataset/mine/image.png", "exp/demo/longer/metrics.csv", "config/x.yaml"]
    made = ["dataset/demo/drawings/star/0001.png", "config/demo/demo_san_tiny.yaml"]
    made.append("exp/demo/san_tiny/model/model_best.pth")
    for name in mine + made:
        path = tmp_path / "demo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert prepare_folder(tmp_path / "demo") == list(MADE)
    assert [(tmp_path / "demo" / name).read_text() for name in mine] == mine
    assert not any((tmp_path / "demo" / name).exists() for name in MADE)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "demo")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (tmp_path / "demo" / "dataset").mkdir()
    (tmp_path / "demo" / "dataset" / "demo").symlink_to(elsewhere)
    assert prepare_folder(tmp_path / "demo") == [Path("dataset/demo")]
    assert (elsewhere / "file").exists()


@pytest.mark.parametrize("content", ["a folder of mine", "a file"])
def test_refuses_what_it_did_not_make(tmp_path: Path, content: str) -> None:
    taken = tmp_path / "taken"
    file = taken if content == "a file" else taken / "dataset" / "demo" / "mine.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    done = sanctl("demo", "--out", "taken", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "taken: exists and was not made by the demo" in done.stderr
    assert "--out" in done.stderr
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*--out DIR"):
        prepare_folder(tmp_path / "file" / "demo")


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = sanctl("demo", "--device", "gpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "--device gpu" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_shown_commands_are_whole_command_lines(device: str | None) -> None:
    """Each is one that `sanctl` can parse: `--help` comes after arguments and options are read."""
    commands = [shlex.split(line) for line in story(device)]
    assert [words[1:3] for words in commands[:4]] == [
        ["dataset", "index"],
        ["dataset", "split"],
        ["dataset", "pack"],
        ["config", "new"],
    ]
    assert [words[1] for words in commands[4:]] == ["train", "test"]
    for words in commands:
        assert words[0] == "sanctl"
        shown = CliRunner().invoke(app, [*words[1:], "--help"])
        assert shown.exit_code == 0
    computing = [words for words in commands if words[1] in {"train", "test"}]
    assert all(("--device" in words) == (device is not None) for words in computing)
