"""The demo's own sketches: the same for the same seed, told apart, drawn inside the picture."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from sanctl.data.drawings import IMAGE_SIDE, SHAPES, draw_dataset, draw_shape

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_draws_the_number_asked_for_into_class_folders(tmp_path: Path) -> None:
    assert draw_dataset(tmp_path, 3, seed=0) == 30
    classes = sorted(path.name for path in tmp_path.iterdir())
    assert classes == sorted(SHAPES)
    assert len(classes) == 10
    for name in classes:
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "0001.png",
            "0002.png",
            "0003.png",
        ]


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", 7), ("b", 7), ("c", 8)):
        draw_dataset(tmp_path / folder, 2, seed=seed)
    first, again, other = (files_of(tmp_path / folder) for folder in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_asking_for_more_keeps_the_first_ones(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "few", 2, seed=1)
    draw_dataset(tmp_path / "many", 4, seed=1)
    few, many = files_of(tmp_path / "few"), files_of(tmp_path / "many")
    assert few.items() <= many.items()
    assert len(many) == 40


def test_the_files_are_gray_png(tmp_path: Path) -> None:
    draw_dataset(tmp_path, 1, seed=0)
    for data in files_of(tmp_path).values():
        assert data.startswith(PNG_SIGNATURE)
        width, height = np.frombuffer(data[16:24], dtype=">u4")
        bit_depth, colour_type = data[24], data[25]
        assert (width, height, bit_depth, colour_type) == (IMAGE_SIDE, IMAGE_SIDE, 8, 0)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert image is not None
        assert image.shape == (IMAGE_SIDE, IMAGE_SIDE)


@pytest.mark.parametrize("name", SHAPES)
def test_a_dark_stroke_on_white_that_stays_inside_the_picture(name: str) -> None:
    for number in range(1, 101):
        image = draw_shape(name, 3, number)
        assert image.shape == (IMAGE_SIDE, IMAGE_SIDE)
        assert image.dtype == np.uint8
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == 255).all()
        assert image.min() < 120
        assert 0.005 < (image < 128).mean() < 0.35


@pytest.mark.parametrize("name", SHAPES)
def test_drawings_of_a_class_differ_in_place_size_and_stroke(name: str) -> None:
    images = [draw_shape(name, 0, number) for number in range(1, 41)]
    assert len({image.tobytes() for image in images}) == len(images)
    boxes = np.array([bounding_box(image) for image in images])
    corners, sizes = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert (corners.std(axis=0) > 3).all()
    assert sizes.max() > 1.25 * sizes.min()
    assert len({int(image.min()) for image in images}) > 10


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[int] = []
    draw_dataset(tmp_path, 2, seed=0, progress=calls.append)
    assert len(calls) > 1
    assert sum(calls) == 20


def test_the_nearest_drawing_nearly_always_has_the_same_class() -> None:
    """With place and size taken out, the classes are separable by plain nearest neighbours."""
    names = list(SHAPES)
    known = np.stack([feature(draw_shape(n, 0, i)) for n in names for i in range(1, 61)])
    asked = np.stack([feature(draw_shape(n, 1, i)) for n in names for i in range(1, 21)])
    predicted = (asked @ known.T).argmax(axis=1) // 60
    accuracy = (predicted == np.repeat(np.arange(len(names)), 20)).mean()
    assert accuracy > 0.95


def bounding_box(image: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(image < 128)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def feature(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The drawing cut out, enlarged to one size with its proportions kept, and blurred."""
    left, top, right, bottom = bounding_box(image)
    side = max(right - left, bottom - top)
    square = np.zeros((side, side))
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    ink = (255.0 - image[top:bottom, left:right]) / 255.0
    square[y : y + bottom - top, x : x + right - left] = ink
    blurred = cv2.GaussianBlur(cv2.resize(square, (32, 32)), (0, 0), 2.0)
    return np.asarray(blurred / np.linalg.norm(blurred)).ravel()
