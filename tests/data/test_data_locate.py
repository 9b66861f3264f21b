from pathlib import Path

import pytest
from file_trees import write_tree

from sanctl.data.locate import (
    PACKS,
    SPLIT_INDEXES,
    as_argument,
    find_dataset,
    find_index,
    index_home,
)
from sanctl.errors import UserError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    write_tree(Path(), names, b"")


def test_the_current_folder_comes_first() -> None:
    touch("data_init.pt", "dataset/a/data_init.pt")
    assert find_dataset() == Path()
    assert find_index() == Path("data_init.pt")


@pytest.mark.parametrize("name", ["data_init.pt", "val_init.pt", "train_imgs.pt"])
def test_the_only_dataset(name: str) -> None:
    touch(f"dataset/a/{name}", "dataset/b/notes.txt", "dataset/file.pt")
    assert find_dataset() == Path("dataset/a")


def test_several_datasets_are_listed() -> None:
    touch("dataset/b/data_init.pt", "dataset/a/data_init.pt")
    with pytest.raises(UserError, match="several datasets: dataset/a, dataset/b; name"):
        find_dataset()


def test_only_what_holds_the_wanted_files_counts() -> None:
    touch("dataset/a/data_init.pt", "dataset/b/train_init.pt", "train_imgs.pt")
    assert find_dataset(None, SPLIT_INDEXES) == Path("dataset/b")
    assert find_index() == Path("dataset/a/data_init.pt")


def test_by_path_and_by_name() -> None:
    touch("elsewhere/x/data_init.pt", "dataset/mini/data_init.pt", "dataset/mini/other_init.pt")
    assert find_dataset(Path("elsewhere/x")) == Path("elsewhere/x")
    assert find_dataset(Path("mini")) == Path("dataset/mini")
    assert find_index(Path("mini")) == Path("dataset/mini/data_init.pt")
    assert find_index(Path("dataset/mini/other_init.pt")) == Path("dataset/mini/other_init.pt")


def test_no_dataset_says_how_to_make_one() -> None:
    with pytest.raises(UserError, match="sanctl dataset index SOURCE"):
        find_index()
    touch("dataset/a/data_init.pt")
    with pytest.raises(UserError, match=r"no train_init.pt.*sanctl dataset split"):
        find_dataset(None, SPLIT_INDEXES)
    with pytest.raises(UserError, match=r"a: holds no train_imgs.pt.*sanctl dataset pack"):
        find_dataset(Path("a"), PACKS)


def test_a_wrong_path() -> None:
    touch("file.txt")
    with pytest.raises(UserError, match="none: there is no such folder"):
        find_dataset(Path("none"))
    with pytest.raises(UserError, match=r"file\.txt: is a file"):
        find_dataset(Path("file.txt"))
    with pytest.raises(UserError, match=r"x\.pt: there is no such file"):
        find_index(Path("x.pt"))


@pytest.mark.parametrize(
    ("source", "home"),
    [
        ("dataset/Sketch_EITZ/png_w256", "dataset/Sketch_EITZ"),
        ("dataset/cats", "dataset/cats"),
        ("pictures/cats", "pictures"),
        ("pictures", "."),
    ],
)
def test_where_an_index_belongs(source: str, home: str) -> None:
    assert index_home(Path(source)) == Path(home)


def test_where_the_index_of_the_current_folder_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("dataset/cats/a/1.png")
    monkeypatch.chdir(tmp_path / "dataset/cats")
    assert index_home(Path()) == Path()
    monkeypatch.chdir("a")
    assert index_home(Path()) == tmp_path / "dataset/cats"


def test_the_next_command_names_the_folder_only_where_it_must() -> None:
    touch("dataset/a/data_init.pt")
    assert as_argument(Path("dataset/a")) == ""
    touch("dataset/b c/data_init.pt")
    assert as_argument(Path("dataset/a")) == " dataset/a"
    assert as_argument(Path("dataset/b c")) == " 'dataset/b c'"
