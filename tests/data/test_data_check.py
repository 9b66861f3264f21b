import hashlib
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from sanctl.data.check import Copy, Damaged, check_parts
from sanctl.data.index import index_folder, save_index
from sanctl.data.pack import pack_index
from sanctl.data.parts import open_parts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 different images in two classes."""
    rng = np.random.default_rng(1)
    for i in range(40):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.{'jpg' if i % 4 < 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), rng.integers(0, 256, (16, 16 + i, 3), np.uint8))
    return tmp_path / "data"


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def truncate(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clean_dataset(root: Path, workers: int) -> None:
    before = snapshot(root)
    done: list[int] = []
    findings = check_parts(open_parts(root), workers, done.append)
    assert findings.clean
    assert findings.images == sum(done) == 40
    assert snapshot(root) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_named_with_the_reason(root: Path, workers: int) -> None:
    truncate(root / "a" / "00.jpg")
    truncate(root / "b" / "03.png")
    truncate(root / "a" / "04.jpg", 0.999)
    (root / "a" / "06.png").write_bytes(b"")
    (root / "b" / "07.png").write_bytes(b"")
    (root / "b" / "09.jpg").write_text("an HTML page, say")
    parts = open_parts(root)
    (root / "b" / "13.jpg").unlink()
    findings = check_parts(parts, workers)
    assert findings.damaged == [
        Damaged("all", str(root / "a" / "00.jpg"), "the file is truncated"),
        Damaged("all", str(root / "a" / "04.jpg"), "the file is truncated"),
        Damaged("all", str(root / "a" / "06.png"), "the file has zero bytes"),
        Damaged("all", str(root / "b" / "03.png"), "the file is truncated"),
        Damaged("all", str(root / "b" / "07.png"), "the file has zero bytes"),
        Damaged("all", str(root / "b" / "09.jpg"), "it is not an image, or its header is damaged"),
        Damaged("all", str(root / "b" / "13.jpg"), "it cannot be read (No such file or directory)"),
    ]
    # Two empty files are alike, but no duplicates of an image.
    assert not findings.duplicates


def test_duplicates(root: Path) -> None:
    shutil.copy(root / "a" / "00.jpg", root / "a" / "again.png")
    shutil.copy(root / "a" / "00.jpg", root / "b" / "again.jpg")
    shutil.copy(root / "b" / "03.png", root / "b" / "04.png")
    (root / "b" / "05.jpg").write_bytes((root / "b" / "09.jpg").read_bytes() + b"\0")
    findings = check_parts(open_parts(root), 0)
    assert not findings.damaged
    assert not findings.leaks
    assert findings.duplicates == [
        [
            Copy("all", str(root / "a" / "00.jpg"), "a"),
            Copy("all", str(root / "a" / "again.png"), "a"),
            Copy("all", str(root / "b" / "again.jpg"), "b"),
        ],
        [
            Copy("all", str(root / "b" / "03.png"), "b"),
            Copy("all", str(root / "b" / "04.png"), "b"),
        ],
    ]


def test_the_same_image_in_two_parts(root: Path) -> None:
    """By its file, which both indexes name, or by a copy of it."""
    shutil.copy(root / "a" / "00.jpg", root / "b" / "copy.jpg")
    index, _ = index_folder(root)
    names = [name for name, _ in index.samples]
    first, copied, shared = (names.index(name) for name in ("a/00.jpg", "b/copy.jpg", "b/03.png"))
    rest = [i for i in range(len(names)) if i not in (first, copied, shared)]
    home = root.parent
    save_index(index.subset([first, *rest[:20], shared]), home / "train_init.pt")
    save_index(index.subset([*rest[20:30], copied]), home / "val_init.pt")
    save_index(index.subset([shared, *rest[30:]]), home / "test_init.pt")
    findings = check_parts(open_parts(home), 0)
    assert not findings.duplicates
    assert [[(copy.part, Path(copy.name).name) for copy in group] for group in findings.leaks] == [
        [("train", "00.jpg"), ("val", "copy.jpg")],
        [("train", "03.png"), ("test", "03.png")],
    ]


def test_packs(root: Path) -> None:
    shutil.copy(root / "a" / "00.jpg", root / "b" / "copy.jpg")
    index, _ = index_folder(root)
    for part, samples in (("train", range(30)), ("val", range(30, 41))):
        pack_index(index.subset(samples), root, root.parent / f"{part}_imgs.pt", workers=0)
    findings = check_parts(open_parts(root.parent), 2)
    assert not findings.damaged
    assert [[copy.name for copy in group] for group in findings.leaks] == [
        ["a/00.jpg", "b/copy.jpg"]
    ]
