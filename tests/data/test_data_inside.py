from pathlib import Path

import pytest
import torch
from file_trees import write_tree

from sanctl.config.schema import DataConfig
from sanctl.data.index import ImageIndex, load_index
from sanctl.data.inside import first_outside, require_inside
from sanctl.data.source import open_source
from sanctl.errors import UserError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_tree(tmp_path, ["outside/x.png", "home/a/0.png"])
    return tmp_path / "home"


def write_index(home: Path, *paths: str) -> Path:
    payload = {"classes": ["a"], "samples": [(path, 0) for path in paths], "extensions": (".png",)}
    torch.save(payload, home / "train_init.pt")
    return home / "train_init.pt"


def allowed(file: Path) -> bool:
    try:
        require_inside(load_index(file), file, "--option")
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/0.png", True),
        ("./a/0.png", True),
        ("a/../a/0.png", True),
        ("a/..0.png", True),
        ("{home}/a/0.png", True),
        ("{home}/a/../a/0.png", True),
        ("../home/a/0.png", True),
        ("../outside/x.png", False),
        ("a/../../outside/x.png", False),
        ("{home}/../outside/x.png", False),
        ("{home}x/0.png", False),
        ("/etc/passwd", False),
    ],
)
def test_where_an_image_may_lie(home: Path, path: str, expected: bool) -> None:
    file = write_index(home, "a/0.png", path.replace("{home}", str(home)))
    assert allowed(file) is expected


def test_through_a_link_to_the_folder(home: Path, tmp_path: Path) -> None:
    """The index names its files by the folder's own path, the user by a link to it."""
    write_index(home, str(home / "a/0.png"))
    (tmp_path / "link").symlink_to(home)
    assert allowed(tmp_path / "link" / "train_init.pt")


def test_old_files_start_from_the_current_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert allowed(write_index(home, "outside/x.png"))
    assert not allowed(write_index(home, "outside/x.png", "../home.png"))
    assert not allowed(write_index(home, "a/0.png", str(tmp_path / "outside/x.png")))


def test_the_configuration_can_allow_it(home: Path) -> None:
    write_index(home, "a/0.png", "../outside/x.png")
    keys = {"data_root": str(home), "dataset_init": "preprocessed_paths", "classes": 2}
    with pytest.raises(UserError, match=r"'\.\./outside/x\.png'.*DATA\.allow_outside: true"):
        open_source(DataConfig.model_validate(keys), "train")
    with pytest.raises(UserError, match=r"set DATA\.classes: 1"):
        open_source(DataConfig.model_validate(keys | {"allow_outside": True}), "train")


def test_the_first_that_leads_out_of_another_folder(home: Path) -> None:
    index = ImageIndex(["a"], [("a/0.png", 0)], root=home)
    assert first_outside(index, home) is None
    assert first_outside(index, home / "a") is None
    assert first_outside(index, home.parent / "outside") == "a/0.png"
