"""The pictures: they decode, have the size and the colours that they should, whatever the names."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from sanctl.report.console import shorten
from sanctl.report.csvlog import CsvReporter
from sanctl.report.plots import Mistake, plot_confusion, plot_curves, plot_mistakes

Play = Callable[..., None]

NASTY = ["$x^{", "a\nb\x1b[31m", "\u0a95\u732b", "name " * 30, "", "50%", "\\frac", "_a_", "#", "é"]
DARK_BLUE = (0x08, 0x30, 0x6B)  # the end of the scale: every image of a class
PALE_BLUE = (0xF7, 0xFB, 0xFF)  # the beginning: none of them
GRAY = (0xE8, 0xE8, 0xE8)  # a class without images

pytestmark = pytest.mark.filterwarnings("error")


def picture(path: Path) -> np.ndarray:
    """A PNG file as (H, W, RGB), with something in it."""
    assert path.read_bytes().startswith(b"\x89PNG")
    image = cv2.imread(str(path))
    assert image is not None
    assert image.shape[2] == 3
    assert image.std() > 1
    rgb: np.ndarray = image[..., ::-1]
    return rgb


def share_of(image: np.ndarray, colour: tuple[int, int, int], tolerance: int = 8) -> float:
    return float((np.abs(image.astype(int) - colour) <= tolerance).all(axis=2).mean())


def matrix_of(image: np.ndarray, n: int) -> np.ndarray:
    """The colours in the middle third of every cell, found by the frame around the matrix."""
    frame = (np.abs(image.astype(int) - 0x76) <= 12).all(axis=2)
    ys = np.flatnonzero(frame.sum(axis=1) > 0.3 * image.shape[1])
    xs = np.flatnonzero(frame.sum(axis=0) > 0.3 * image.shape[0])
    top, bottom, left, right = ys[0], ys[-1], xs[0], xs[-1]
    cells = np.zeros((n, n, 3))
    for i in range(n):
        for j in range(n):
            # The upper left of a cell: texts stand in its middle.
            y = round(top + (i + 0.2) * (bottom - top) / n)
            x = round(left + (j + 0.2) * (right - left) / n)
            cells[i, j] = image[y, x]
    return cells


@pytest.mark.parametrize(("epochs", "validates"), [(1, True), (1, False), (12, True)])
def test_curves(play: Play, tmp_path: Path, epochs: int, validates: bool) -> None:
    csv = tmp_path / "metrics.csv"
    play(CsvReporter(csv, pytest.fail), tmp_path, last=epochs, validates=validates)
    paths = plot_curves(csv, tmp_path / "plots")

    assert [path.name for path in paths] == ["loss.png", "accuracy.png", "learning_rate.png"]
    for path in paths:
        image = picture(path)
        assert 1200 < image.shape[1] < 1400
        assert share_of(image, (0x00, 0x72, 0xB2)) > 1e-4
        assert share_of(image, (255, 255, 255)) > 0.8
    assert (share_of(picture(paths[0]), (0xD5, 0x5E, 0x00)) > 1e-4) == validates


def test_curves_with_a_gap_and_without_rows(tmp_path: Path) -> None:
    csv = tmp_path / "metrics.csv"
    csv.write_text(
        "epoch,lr,loss_train,top1_train,top5_train,top1_val\n1,0.1,nan,inf,,\n2,0,1,2,3,\n"
    )
    for path in plot_curves(csv, tmp_path):
        picture(path)
    csv.write_text("epoch,lr\n")
    assert plot_curves(csv, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("n", [2, 10, 25])
def test_confusion_cells_have_the_colour_of_their_share(tmp_path: Path, n: int) -> None:
    matrix = np.diag(np.full(n, 3))
    matrix[0] = 0
    matrix[0, 1] = 1000  # normalised by row: as dark as the diagonal
    matrix[1] = 0
    plot_confusion(matrix, [f"class {i}" for i in range(n)], tmp_path / "test" / "confusion.png")

    cells = matrix_of(picture(tmp_path / "test" / "confusion.png"), n)
    for i in range(n):
        for j in range(n):
            dark = (i == j and i > 1) or (i, j) == (0, 1)
            expected = GRAY if i == 1 else DARK_BLUE if dark else PALE_BLUE
            np.testing.assert_allclose(cells[i, j], expected, atol=4, err_msg=f"{i}, {j}")


@pytest.mark.parametrize("n", [1, 10, 136, 250])
def test_confusion_of_any_size_fits_a_page(tmp_path: Path, n: int) -> None:
    matrix = np.random.default_rng(0).integers(0, 5, (n, n)) + 50 * np.eye(n, dtype=int)
    names = [NASTY[i % len(NASTY)] for i in range(n)]
    plot_confusion(matrix, names, tmp_path / "confusion.png")
    height, width, _ = picture(tmp_path / "confusion.png").shape
    assert 500 < height < 2600
    assert 500 < width < 3400


def test_confusion_without_a_single_image(tmp_path: Path) -> None:
    plot_confusion(np.zeros((30, 30), np.int64), ["a"] * 30, tmp_path / "confusion.png")
    assert share_of(picture(tmp_path / "confusion.png"), GRAY) > 0.2


def test_confusion_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 classes is \(3, 3\), not \(2, 2\)"):
        plot_confusion(np.eye(2), ["a", "b", "c"], tmp_path / "confusion.png")


def mistake(i: int, channels: int) -> Mistake:
    """A uniform image of its own colour and sides."""
    colour = np.array([40 * (i % 6), 200 - 20 * (i % 9), 90], np.uint8)[:channels]
    image = np.broadcast_to(colour, (30 + 40 * (i % 3), 64, channels)).copy()
    return Mistake(image, NASTY[i % 10], NASTY[(i + 1) % 10], 1 / (i + 1))


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (2, 3), (7, 1), (32, 3)])
def test_mistakes_show_every_image_in_its_colour(tmp_path: Path, count: int, channels: int) -> None:
    items = [mistake(i, channels) for i in range(count)]
    plot_mistakes(items, tmp_path / "mistakes.png")

    image = picture(tmp_path / "mistakes.png")
    for item in items[:6]:
        shade = item.image[0, 0]
        red, green, blue = (int(x) for x in (np.repeat(shade, 3) if channels == 1 else shade))
        assert share_of(image, (red, green, blue), tolerance=1) > 0.1 / count
    assert image.shape[1] < 2600


def test_no_mistakes_is_a_picture_that_says_so(tmp_path: Path) -> None:
    plot_mistakes([], tmp_path / "mistakes.png")
    assert picture(tmp_path / "mistakes.png").shape[1] > 400


def test_shortened_names_keep_both_ends() -> None:
    assert shorten("abc", 3) == "abc"
    assert shorten("Anglo-Saxon_Futhorc/character07", 13) == "Anglo-…cter07"
    assert shorten("abcdef", 4) == "a…ef"
    assert all(len(shorten("x" * 50, n)) == n for n in range(3, 40))
    assert shorten("a\nb", 20) == "a\\nb"
