import os
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from file_trees import PNG, write_classes, write_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from sanctl.data.index import (
    ImageIndex,
    index_folder,
    load_index,
    require_same_classes,
    save_index,
)
from sanctl.data.scan import split_folders
from sanctl.data.sniff import can_be_image, find_non_images
from sanctl.errors import SanctlError, UserError

NAME = st.text(string.ascii_letters + "0 _-éß", min_size=1, max_size=4).filter(
    lambda name: not name.isspace()
)
FILE = st.tuples(
    st.lists(NAME, max_size=2), NAME, st.sampled_from([".png", ".JPG", ".tiff", ".webp"])
).map(lambda parts: "/".join([*parts[0], "f" + parts[1] + parts[2]]))
TREE = st.dictionaries(
    NAME, st.lists(FILE, min_size=1, max_size=4, unique=True), min_size=1, max_size=5
)


@settings(max_examples=40)
@given(TREE, st.sets(st.sampled_from(["notes.txt", "cls.csv", "x.pt"])))
def test_index_is_that_of_torchvision(tree: dict[str, list[str]], extra: set[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tree(folder, [f"{cls}/{file}" for cls, files in tree.items() for file in files])
        first = next(iter(tree))
        write_tree(folder, [*extra, *(f"{first}/{file}" for file in extra)], b"text")
        expected = ImageFolder(name)
        index, ignored = index_folder(folder)
        assert index.classes == expected.classes
        assert index.class_to_idx == expected.class_to_idx
        assert [(str(folder / path), target) for path, target in index.samples] == expected.samples
        assert index.targets.dtype == np.int64
        assert index.targets.tolist() == expected.targets
        assert sorted(ignored) == sorted(
            place / file for place in (folder, folder / first) for file in extra
        )


def test_depth_two_makes_one_class_of_each_second_level_folder(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        ["Greek/c2/a.png", "Greek/c1/b.png", "Balinese/c1/sub/z.png", "Balinese/c1/a.png"],
    )
    write_tree(tmp_path, ["Greek/readme.txt", "top.png"])
    index, ignored = index_folder(tmp_path, depth=2)
    assert index.classes == ["Balinese/c1", "Greek/c1", "Greek/c2"]
    assert index.samples == [
        ("Balinese/c1/a.png", 0),
        ("Balinese/c1/sub/z.png", 0),
        ("Greek/c1/b.png", 1),
        ("Greek/c2/a.png", 2),
    ]
    assert sorted(ignored) == [tmp_path / "Greek/readme.txt", tmp_path / "top.png"]


def test_what_is_hidden_or_no_regular_file_is_left_out(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "a/._1.png", ".cache/x.png", "a/.hidden/2.png"])
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "a/dangling.txt").symlink_to("nowhere.txt")
    (tmp_path / "a/self.txt").symlink_to("self.txt")
    index, ignored = index_folder(tmp_path)
    assert index.samples == [("a/1.png", 0)]
    assert {str(path.relative_to(tmp_path)) for path in ignored} == {
        ".cache",
        "a/._1.png",
        "a/.hidden",
        "a/pipe.png",
        "a/dangling.txt",
        "a/self.txt",
    }


def test_links_to_nowhere_with_the_name_of_an_image_are_images_to_be_missed(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png"])
    (tmp_path / "a/dangling.png").symlink_to("nowhere.png")
    (tmp_path / "a/self.PNG").symlink_to("self.PNG")
    index, ignored = index_folder(tmp_path)
    assert index.samples == [("a/1.png", 0), ("a/dangling.png", 0), ("a/self.PNG", 0)]
    assert not ignored
    assert find_non_images(index) == [tmp_path / "a/dangling.png", tmp_path / "a/self.PNG"]


def test_links_are_followed_but_never_round_in_a_loop(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", ["a/1.png", "b/2.png"])
    write_tree(tmp_path / "elsewhere", ["3.png"])
    (source / "a/linked").symlink_to(tmp_path / "elsewhere")
    (source / "a/file.png").symlink_to(tmp_path / "elsewhere/3.png")
    (source / "a/up").symlink_to(source)
    (source / "a/here").symlink_to(".")
    (source / "a/to_b").symlink_to(source / "b")
    (source / "b/to_a").symlink_to(source / "a")
    index, ignored = index_folder(source)
    assert [path for path, target in index.samples if target == 0] == [
        "a/1.png",
        "a/file.png",
        "a/linked/3.png",
        "a/to_b/2.png",
    ]
    assert [path for path, target in index.samples if target == 1][:1] == ["b/2.png"]
    assert source / "a/up" in ignored
    assert source / "a/to_b/to_a" in ignored


def test_files_of_the_dataset_itself_are_no_surprise(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "data_init.pt", "train_imgs.pt"])
    assert index_folder(tmp_path)[1] == []


def test_a_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_tree(tmp_path / "png", [f"a/{name}"])
    index, _ = index_folder(tmp_path / "png")
    save_index(index, tmp_path / "data_init.pt")
    loaded = load_index(tmp_path / "data_init.pt")
    assert loaded.path(0).read_bytes() == PNG


@pytest.mark.parametrize(
    ("files", "depth", "message"),
    [
        ([], 1, "holds no folders"),
        (["1.png", "2.png"], 1, "holds images but no folders"),
        (["a/1.png"], 2, "a holds images but no folders; expected one folder per class, 2"),
        (["a/1.txt"], 1, "no images in any class folder"),
        (["a/1.png", "b/x.txt"], 1, "class folder without images: b;"),
        (
            ["a/1.png", "b/x", "c/x", "d/x", "e/x"],
            1,
            "class folders without images: b, c, d and 1 more;",
        ),
    ],
)
def test_folders_that_are_no_dataset(
    tmp_path: Path, files: list[str], depth: int, message: str
) -> None:
    write_tree(tmp_path, files)
    with pytest.raises(UserError, match=message) as caught:
        index_folder(tmp_path, depth)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        index_folder(tmp_path / "none")
    write_tree(tmp_path, ["images.zip"])
    with pytest.raises(UserError, match=r"images\.zip is a file"):
        index_folder(tmp_path / "images.zip")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["val", "train"], ["train", "val"]),
        (["test", "val", "train"], ["train", "val", "test"]),
        (["train", "test"], ["train", "test"]),
        (["train", "val", "boat"], []),
        (["val", "test"], []),
        (["train"], []),
        (["cat", "dog"], []),
    ],
)
def test_which_folders_are_parts(tmp_path: Path, folders: list[str], expected: list[str]) -> None:
    write_tree(tmp_path, [f"{name}/a/1.png" for name in folders])
    assert split_folders(tmp_path) == expected


def test_parts_with_different_classes_are_named(tmp_path: Path) -> None:
    write_tree(tmp_path, ["train/a/1.png", "train/b/1.png", "val/a/1.png"])
    indexes = {part: index_folder(tmp_path / part)[0] for part in ("train", "val")}
    with pytest.raises(UserError, match=r"val: no folder for b, which train has"):
        require_same_classes(indexes)
    write_tree(tmp_path, ["val/b/1.png", "val/c/1.png"])
    indexes["val"] = index_folder(tmp_path / "val")[0]
    with pytest.raises(UserError, match=r"train: no folder for c, which val has"):
        require_same_classes(indexes)


@pytest.mark.parametrize(
    ("place", "stored"),
    [
        ("data/index.pt", "png/a/0000.png"),
        ("data/png/index.pt", "a/0000.png"),
        ("other/index.pt", "../data/png/a/0000.png"),
        ("far/away/index.pt", "{root}/data/png/a/0000.png"),
    ],
)
def test_saved_paths_are_relative_where_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, stored: str
) -> None:
    write_classes(tmp_path / "data/png", {"a": 2, "b": 1})
    monkeypatch.chdir(tmp_path)
    index, _ = index_folder(Path("data/png"))
    save_index(index, Path(place))
    payload = torch.load(place, weights_only=True)
    assert payload["samples"][0] == (stored.format(root=tmp_path), 0)
    assert payload["classes"] == ["a", "b"]
    assert payload["class_to_idx"] == {"a": 0, "b": 1}
    assert ".png" in payload["extensions"]
    loaded = load_index(Path(place))
    assert [loaded.path(i).resolve() for i in range(3)] == [
        tmp_path / "data/png" / name for name in ("a/0000.png", "a/0001.png", "b/0000.png")
    ]
    monkeypatch.chdir(tmp_path / "data")
    again = tmp_path / "data/again.pt"
    save_index(load_index(tmp_path / place), again)
    assert load_index(again).samples[0][0].endswith("a/0000.png")
    assert load_index(again).path(0).is_file()


def test_an_index_moves_with_its_folder(tmp_path: Path) -> None:
    write_classes(tmp_path / "old/png", {"a": 1})
    save_index(index_folder(tmp_path / "old/png")[0], tmp_path / "old/data_init.pt")
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_index(tmp_path / "new/data_init.pt").path(0).is_file()


def test_old_files_start_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "dataset/eitz/png", {"a": 1, "b": 1})
    old = {
        "classes": ["a", "b"],
        "samples": [["dataset/eitz/png/a/0000.png", 0], ["dataset/eitz/png/b/0000.png", 1]],
    }
    torch.save(old, tmp_path / "dataset/eitz/train_init.pt")
    monkeypatch.chdir(tmp_path)
    index = load_index(Path("dataset/eitz/train_init.pt"))
    assert index.path(1).is_file()
    # Written anew, it no longer matters where from.
    save_index(index, Path("dataset/eitz/val_init.pt"))
    monkeypatch.chdir("/")
    assert load_index(tmp_path / "dataset/eitz/val_init.pt").samples[1] == ("png/b/0000.png", 1)


def test_the_folder_of_the_file_comes_before_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / "set"):
        write_classes(folder / "png", {"a": 1})
    torch.save({"classes": ["a"], "samples": [("png/a/0000.png", 0)]}, tmp_path / "set/x.pt")
    monkeypatch.chdir(tmp_path)
    assert load_index(Path("set/x.pt")).path(0) == Path("set/png/a/0000.png")


@pytest.mark.parametrize(
    "payload",
    [
        [1, 2],
        {"classes": ["a"]},
        {"classes": "a", "samples": []},
        {"classes": ["a", "a"], "samples": []},
        {"classes": [], "samples": []},
        {"classes": ["a"], "class_to_idx": {"a": 1}, "samples": []},
        {"classes": ["a"], "samples": 3},
        {"classes": ["a"], "samples": [("x.png", 1)]},
        {"classes": ["a"], "samples": [("x.png", -1)]},
        {"classes": ["a"], "samples": [("x.png", True)]},
        {"classes": ["a"], "samples": [(5, 0)]},
        {"classes": ["a"], "samples": [("x.png",)]},
        {"classes": ["a"], "samples": [("x.png", 0)], "extensions": 3},
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path: Path, payload: object) -> None:
    path = tmp_path / "data_init.pt"
    torch.save(payload, path)
    with pytest.raises(UserError, match="no usable index") as caught:
        load_index(path)
    assert str(path) in str(caught.value)


class RunsOnLoading:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_index_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "data_init.pt", tmp_path / "executed"
    torch.save(
        {"classes": ["a"], "samples": [RunsOnLoading(marker)]},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError, match="refused"):
        load_index(path)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, -40])
def test_a_cut_index_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "data_init.pt"
    save_index(ImageIndex(["a"], [("x.png", 0)], root=tmp_path), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"data_init\.pt: refused: damaged"):
        load_index(path)


def test_a_missing_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        load_index(tmp_path / "data_init.pt")


def test_files_that_are_no_images_are_found(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 600})
    write_tree(tmp_path, ["b/zero.png"], b"")
    write_tree(tmp_path, ["b/text.jpg"], b"hello, I am text")
    index, _ = index_folder(tmp_path)
    seen: list[int] = []
    assert find_non_images(index, seen.append) == [tmp_path / "b/text.jpg", tmp_path / "b/zero.png"]
    assert sum(seen) == 602


@pytest.mark.parametrize(
    "format_name",
    ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"],
)
def test_every_format_passes_as_an_image(tmp_path: Path, format_name: str) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "x", format=format_name)
    assert can_be_image((tmp_path / "x").read_bytes()[:16])


def test_a_full_disk_leaves_the_previous_index(tmp_path: Path) -> None:
    path = tmp_path / "data_init.pt"
    save_index(ImageIndex(["a"], [("x.png", 0)], root=tmp_path), path)
    before = path.read_bytes()
    # A limit on the size of files stands for the end of the disk: the same error from the system.
    code = f"""
import resource
from pathlib import Path
from sanctl.data.index import ImageIndex, save_index
from sanctl.errors import SanctlError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
many = [(f"{{i}}.png", 0) for i in range(100_000)]
try:
    save_index(ImageIndex(["a"], many), Path({str(path)!r}))
except SanctlError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith(f"cannot write {path}: File too large; the previous file is int")
    assert str(tmp_path) in done.stdout
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["data_init.pt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SanctlError, match=r"cannot write .*file/x\.pt: .*nothing was written"):
        save_index(ImageIndex(["a"], [("x.png", 0)]), tmp_path / "file/x.pt")
