import gc
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sanctl.config.schema import DataConfig
from sanctl.data.decode import ImageError
from sanctl.data.index import ImageIndex, index_folder, save_index
from sanctl.data.pack import pack_index
from sanctl.data.source import FileSource, ImageSource, TextTable, open_source
from sanctl.errors import UserError

CLASSES = ["circle", "line", "star"]
PER_CLASS = 4


def draw(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value % 256, 10, 20)).save(path)


def make_folders(root: Path) -> None:
    for part in ("train", "val"):
        for k, name in enumerate(CLASSES):
            for i in range(PER_CLASS):
                draw(root / part / name / f"{i}.png", 40 * k + i)


def make_indexes(root: Path) -> None:
    make_folders(root)
    for part in ("train", "val"):
        save_index(index_folder(root / part)[0], root / f"{part}_init.pt")


def make_packs(root: Path) -> None:
    make_folders(root)
    for part in ("train", "val"):
        pack_index(index_folder(root / part)[0], root / part, root / f"{part}_imgs.pt", workers=0)


def make_texts(root: Path) -> None:
    make_folders(root)
    for part in ("train", "val"):
        lines = [
            f"{part}/{name}/{i}.png\t{k}\n"
            for k, name in enumerate(CLASSES)
            for i in range(PER_CLASS)
        ]
        (root / f"{part}.txt").write_text("".join(lines))
    (root / "mapping.txt").write_text("".join(f"{c}\t{k}\n" for k, c in enumerate(CLASSES)))


MAKERS: dict[str, Callable[[Path], None]] = {
    "image_folder": make_folders,
    "preprocessed_paths": make_indexes,
    "byte_imgs": make_packs,
    "txt_mappings": make_texts,
}


def config(root: Path, kind: str, classes: int = 3) -> DataConfig:
    return DataConfig.model_validate(
        {"data_root": str(root), "dataset_init": kind, "classes": classes}
    )


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("part", ["train", "val"])
def test_every_kind_gives_the_same(kind: str, part: Any, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path)
    source = open_source(config(tmp_path, kind), part)
    assert source.classes == CLASSES
    assert source.targets.dtype == np.int64
    assert source.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(source) == 12
    for i in range(12):
        file = tmp_path / part / CLASSES[i // 4] / f"{i % 4}.png"
        assert bytes(source.read(i)) == file.read_bytes()
        assert source.name(i).endswith(f"{CLASSES[i // 4]}/{i % 4}.png")


@pytest.mark.parametrize("kind", MAKERS)
def test_a_source_can_go_to_another_process(kind: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path)
    source = open_source(config(tmp_path, kind), "train")
    twin: ImageSource = pickle.loads(pickle.dumps(source))
    assert [bytes(twin.read(i)) for i in range(12)] == [bytes(source.read(i)) for i in range(12)]
    assert twin.targets.tolist() == source.targets.tolist()


@pytest.mark.parametrize("kind", ["preprocessed_paths", "txt_mappings"])
def test_paths_of_old_files_start_from_the_current_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folders(tmp_path / "pictures")
    root = tmp_path / "dataset" / "old"
    root.mkdir(parents=True)
    samples = [(f"pictures/train/{c}/{i}.png", k) for k, c in enumerate(CLASSES) for i in range(4)]
    torch.save(
        {
            "classes": CLASSES,
            "class_to_idx": {c: k for k, c in enumerate(CLASSES)},
            "samples": samples,
            "extensions": (".png",),
        },
        root / "train_init.pt",
    )
    (root / "train.txt").write_text("".join(f"{p}\t{k}\n" for p, k in samples))
    (root / "mapping.txt").write_text("".join(f"{c}\t{k}\n" for k, c in enumerate(CLASSES)))
    monkeypatch.chdir(tmp_path)
    source = open_source(config(Path("dataset/old"), kind), "train")
    assert source.read(5) == (tmp_path / "pictures/train/line/1.png").read_bytes()


def test_text_files_may_end_lines_as_windows_does_and_have_empty_ones(tmp_path: Path) -> None:
    make_texts(tmp_path)
    for name in ("train.txt", "mapping.txt"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n\r\n").encode())
    source = open_source(config(tmp_path, "txt_mappings"), "train")
    assert source.classes == CLASSES
    assert len(source) == 12


def failing(root: Path, kind: str, part: Any = "train", classes: int = 3) -> str:
    with pytest.raises(UserError) as caught:
        open_source(config(root, kind, classes), part)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", MAKERS)
def test_no_dataset_folder(kind: str, tmp_path: Path) -> None:
    message = failing(tmp_path / "nowhere", kind)
    assert "nowhere" in message
    assert "DATA.data_root" in message


@pytest.mark.parametrize(
    ("kind", "missing", "mend"),
    [
        ("image_folder", "train", "sanctl dataset"),
        ("preprocessed_paths", "train_init.pt", "sanctl dataset split"),
        ("byte_imgs", "train_imgs.pt", "sanctl dataset pack"),
        ("txt_mappings", "mapping.txt", "txt_mappings"),
    ],
)
def test_a_missing_part(kind: str, missing: str, mend: str, tmp_path: Path) -> None:
    message = failing(tmp_path, kind)
    assert str(tmp_path / missing) in message
    assert mend in message


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("classes", [2, 250])
def test_another_number_of_classes(kind: str, classes: int, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path)
    message = failing(tmp_path, kind, classes=classes)
    assert "3 classes" in message
    assert f"DATA.classes is {classes}" in message
    assert "set DATA.classes: 3" in message


def test_an_empty_class_folder(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "train" / "zebra").mkdir()
    assert "zebra" in failing(tmp_path, "image_folder")


def test_class_folders_that_differ_between_parts(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "val" / "star").rename(tmp_path / "val" / "stars")
    message = failing(tmp_path, "image_folder", "val")
    assert "star" in message
    assert "val" in message


@pytest.mark.parametrize("kind", ["preprocessed_paths", "txt_mappings"])
def test_no_images_and_classes_without_images(kind: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path)
    index = ImageIndex(CLASSES, [("train/star/0.png", 2)], root=tmp_path)
    for samples, named in (([], ["train", "no images"]), (index.samples, ["circle", "line"])):
        save_index(ImageIndex(CLASSES, list(samples), root=tmp_path), tmp_path / "train_init.pt")
        (tmp_path / "train.txt").write_text("".join(f"{p}\t{k}\n" for p, k in samples))
        message = failing(tmp_path, kind)
        assert all(word in message for word in named)


def test_a_class_may_be_absent_from_the_evaluation(tmp_path: Path) -> None:
    make_indexes(tmp_path)
    index = ImageIndex(CLASSES, [("val/star/0.png", 2)], root=tmp_path)
    save_index(index, tmp_path / "val_init.pt")
    assert len(open_source(config(tmp_path, "preprocessed_paths"), "val")) == 1


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("train.txt", "train/star/0.png 2\n", "train.txt, line 1"),
        ("train.txt", "train/star/0.png\t2\nx.png\ttwo\n", "train.txt, line 2"),
        ("train.txt", "train/star/0.png\t-1\n", "train.txt, line 1"),
        ("train.txt", "train/star/0.png\t3\n", "class index 3 is not in"),
        ("mapping.txt", "circle\t0\nline\t0\nstar\t2\n", "index 0 is already that of circle"),
        ("mapping.txt", "circle\t0\nline\t1\nstar\t3\n", "0 to 2 without a gap"),
        ("mapping.txt", "circle\t0\nstar\n", "mapping.txt, line 2"),
    ],
)
def test_text_files_with_mistakes(file: str, text: str, says: str, tmp_path: Path) -> None:
    make_texts(tmp_path)
    (tmp_path / file).write_text(text)
    assert says in failing(tmp_path, "txt_mappings")


def test_a_text_file_that_is_no_text(tmp_path: Path) -> None:
    make_texts(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"a\xff\xfe\t0\n")
    assert "UTF-8" in failing(tmp_path, "txt_mappings")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("kind", "file"),
    [("preprocessed_paths", "train_init.pt"), ("byte_imgs", "train_imgs.pt")],
)
def test_a_hostile_pickle_is_refused(kind: str, file: str, tmp_path: Path) -> None:
    torch.save({"classes": CLASSES, "samples": Trap(tmp_path / "trap")}, tmp_path / file)
    assert str(tmp_path / file) in failing(tmp_path, kind)
    assert not (tmp_path / "trap").exists()


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    make_indexes(tmp_path)
    source = open_source(config(tmp_path, "preprocessed_paths"), "train")
    gone = tmp_path / "train" / "line" / "2.png"
    gone.unlink()
    with pytest.raises(ImageError, match=re.escape(str(gone))):
        source.read(6)


def test_a_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    draw(tmp_path / "only" / name, 1)
    source = FileSource(ImageIndex(["only"], [(f"only/{name}", 0)], root=tmp_path))
    assert source.read(0) == (tmp_path / "only" / name).read_bytes()


@given(st.lists(st.text(st.characters(), max_size=8), max_size=20))
def test_a_table_gives_its_texts_back(texts: list[str]) -> None:
    table = TextTable(texts)
    assert [table[i] for i in range(len(texts))] == texts


def test_a_large_source_holds_few_objects() -> None:
    """Objects that worker processes touch are copied to each of them; arrays are not."""
    samples = [(f"class{i % 10}/image{i:07}.png", i % 10) for i in range(20_000)]
    gc.collect()
    before = sys.getallocatedblocks()
    source = FileSource(ImageIndex([f"class{i}" for i in range(10)], samples))
    gc.collect()
    assert sys.getallocatedblocks() - before < 1_000
    assert source.name(19_999) == "class9/image0019999.png"
