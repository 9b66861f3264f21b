import csv
import json
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sanctl.data.index import ImageIndex, index_folder, save_index
from sanctl.data.pack import pack_index
from sanctl.data.parts import open_parts
from sanctl.data.source import FileSource
from sanctl.data.stats import (
    PartStats,
    PixelSums,
    Spread,
    class_rows,
    measure_source,
    write_stats_csv,
    write_stats_json,
)
from sanctl.errors import SanctlError, UserError

COUNTS = {"ant": 50, "bee": 3, "cow": 17}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many sizes, colour and gray, PNG and JPEG, in three classes."""
    root = tmp_path_factory.mktemp("stats")
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        (root / name).mkdir()
        for i in range(count):
            shape = (10 + i, 12 + 2 * i, 3) if i % 5 else (10 + i, 12 + 2 * i)
            image = rng.integers(0, 200, shape, np.uint8)
            assert cv2.imwrite(str(root / name / f"{i:03}.{'jpg' if i % 2 else 'png'}"), image)
    return root


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_against_numpy_on_all_pixels_at_once(root: Path, channels: int, workers: int) -> None:
    source = FileSource(index_folder(root)[0])
    done: list[int] = []
    stats = measure_source(source, channels, workers, done.append)
    mode = "RGB" if channels == 3 else "L"
    images = [
        np.asarray(Image.open(path).convert(mode)).reshape(-1, channels)
        for path in sorted(root.rglob("*.*"))
    ]
    pixels = np.concatenate(images).astype(np.float64) / 255
    np.testing.assert_allclose(stats.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, pixels.std(axis=0), rtol=1e-10)
    assert stats.counts == COUNTS
    assert stats.images == sum(done) == 70
    assert stats.per_class == Spread(3, 17.0, 50)
    assert stats.height.least == 10
    assert stats.width.most == 12 + 2 * 49
    assert stats.formats == {"PNG": 36, "JPEG": 34}
    assert stats.unreadable == 0


def test_the_median_size(tmp_path: Path) -> None:
    for i, (width, height) in enumerate([(10, 7), (30, 5), (20, 9)]):
        path = tmp_path / "a" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (width, height)).save(path)
    stats = measure_source(FileSource(index_folder(tmp_path)[0]), 3, 0)
    assert (stats.width, stats.height) == (Spread(10, 20.0, 30), Spread(5, 7.0, 9))


def test_unreadable_images_count_for_their_class_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 51)).save(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "bad.png").write_bytes(b"no image")
    stats = measure_source(FileSource(index_folder(tmp_path)[0]), 3, 0)
    assert (stats.images, stats.unreadable) == (2, 1)
    assert stats.mean == [1.0, 0.0, 0.2]
    assert stats.std == [0.0, 0.0, 0.0]


def test_a_part_without_a_readable_image() -> None:
    stats = measure_source(FileSource(ImageIndex(["a"], [("gone.png", 0)])), 3, 0)
    assert (stats.mean, stats.std, stats.width) == ([], [], Spread(0, 0.0, 0))
    assert stats.unreadable == 1


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 255)), min_size=1, max_size=9
    ),
    st.sampled_from([1, 3]),
)
def test_sums_in_any_parts_are_those_of_the_whole(
    shapes: list[tuple[int, int, int]], channels: int
) -> None:
    images = [
        np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
        for height, width, seed in shapes
    ]
    whole, first, second = PixelSums(), PixelSums(), PixelSums()
    for i, image in enumerate(images):
        whole.add(image)
        (first, second)[i % 2].add(image)
    first.merge(second)
    assert first == whole
    flat = np.concatenate([image.reshape(-1, channels) for image in images]).astype(np.int64)
    assert (whole.sums, whole.squares) == (flat.sum(0).tolist(), (flat**2).sum(0).tolist())


def test_sums_stay_exact_where_floats_of_32_bits_would_not() -> None:
    sums = PixelSums()
    image = np.full((6000, 6000, 1), 255, np.uint8)
    image[0, 0] = 254
    for _ in range(3):
        sums.add(image)
    assert sums.sums == [3 * (255 * 36_000_000 - 1)]
    assert sums.std()[0] == pytest.approx((1 / 36_000_000) ** 0.5 / 255, rel=1e-6)


def figures() -> dict[str, PartStats]:
    one = PartStats(
        {"a, b": 3, "ü": 1}, Spread(1, 2, 3), Spread(4, 5, 6), {"PNG": 4}, [0.5], [1], 0
    )
    two = PartStats({"ü": 2}, Spread(1, 2, 3), Spread(4, 5, 6), {}, [], [], 2)
    return {"train": one, "val": two}


def test_files_hold_every_class(tmp_path: Path) -> None:
    assert class_rows(figures()) == [("a, b", [3, 0]), ("ü", [1, 2])]
    write_stats_csv(figures(), tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["class", "train", "val"],
            ["a, b", "3", "0"],
            ["ü", "1", "2"],
        ]
    write_stats_json(figures(), tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["train"]["classes"] == {"a, b": 3, "ü": 1}
    assert content["train"]["images_per_class"] == {"least": 1, "median": 2.0, "most": 3}
    assert content["val"]["unreadable"] == 2


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (write_stats_csv, write_stats_json):
        with pytest.raises(SanctlError, match="cannot write"):
            write(figures(), tmp_path / "file" / "x")


opened = partial(open_parts, allow_outside=True)


def test_the_parts_of_every_kind_of_dataset(root: Path, tmp_path: Path) -> None:
    index, _ = index_folder(root)
    lengths = {part: len(source) for part, source in open_parts(root).items()}
    assert lengths == {"all": 70}

    save_index(index, tmp_path / "data_init.pt")
    with pytest.raises(UserError, match="--allow-outside"):
        open_parts(tmp_path)
    assert list(open_parts(tmp_path, allow_outside=True)) == ["all"]
    for part, samples in (("train", range(60)), ("val", range(60, 70))):
        save_index(index.subset(samples), tmp_path / f"{part}_init.pt")
    lengths = {part: len(source) for part, source in opened(tmp_path).items()}
    assert lengths == {"train": 60, "val": 10}
    assert list(opened(tmp_path / "val_init.pt")) == ["val"]
    assert len(opened(tmp_path / "data_init.pt")["all"]) == 70

    packs = tmp_path / "packs"
    pack_index(index, root, packs / "train_imgs.pt", workers=0)
    assert len(open_parts(packs)["train"]) == len(open_parts(packs / "train_imgs.pt")["train"])

    for part in ("train", "val"):
        (tmp_path / "folders").mkdir(exist_ok=True)
        (tmp_path / "folders" / part).symlink_to(root)
    assert list(open_parts(tmp_path / "folders")) == ["train", "val"]


def test_class_folders_two_levels_deep(root: Path, tmp_path: Path) -> None:
    (tmp_path / "animals").symlink_to(root)
    assert open_parts(tmp_path, depth=2)["all"].classes == [
        "animals/ant",
        "animals/bee",
        "animals/cow",
    ]


def test_the_dataset_of_the_current_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "dataset" / "zoo" / "images"
    shutil.copytree(root, images)
    save_index(index_folder(images)[0], images.parent / "data_init.pt")
    monkeypatch.chdir(tmp_path)
    assert len(open_parts(None)["all"]) == len(open_parts(Path("zoo"))["all"]) == 70


def test_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError):
            open_parts(path)
