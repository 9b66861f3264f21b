"""Images on their way into a pack: what they become, and what is left alone."""

import io

import cv2
import numpy as np
import pytest
from file_trees import encode, photo
from PIL import Image

from sanctl.data.shrink import shrink


def mean_of_areas(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, C) by giving each new pixel the mean over the area that it covers."""

    def overlaps(new: int, old: int) -> np.ndarray:
        edges = np.arange(new + 1) * (old / new)
        pixels = np.arange(old)
        low = np.maximum(edges[:-1, None], pixels)
        high = np.minimum(edges[1:, None], pixels + 1)
        return np.clip(high - low, 0, None) / (old / new)

    rows, columns = overlaps(height, image.shape[0]), overlaps(width, image.shape[1])
    return np.einsum("hi,ijc,wj->hwc", rows, image.astype(float), columns, optimize=True)


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".tif", ".webp", ".ppm"])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 40), (40, 40), (33, 1000)])
def test_large_images_are_shrunk_to_the_short_side(ending: str, height: int, width: int) -> None:
    image = photo(height, width)
    shrunk = shrink(encode(image, ending), 32, "x")
    assert shrunk.is_smaller
    expected_format = "JPEG" if ending == ".jpg" else "PNG"
    with Image.open(io.BytesIO(shrunk.data)) as opened:
        assert opened.format == expected_format
        assert min(opened.size) == 32
        ratio = opened.width / opened.height
        assert abs(ratio - width / height) < 0.5 / 32 * ratio + 0.02
        got = np.asarray(opened.convert("RGB")).astype(int)
    with Image.open(io.BytesIO(encode(image, ending))) as opened:
        want = mean_of_areas(np.asarray(opened.convert("RGB")), *got.shape[:2])
    assert np.abs(got - want).max() <= (1 if ending != ".jpg" else 25)
    assert np.abs(got - want).mean() < (1 if ending != ".jpg" else 2.5)


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_an_image_is_left_alone_up_to_the_short_side(ending: str) -> None:
    data = encode(photo(32, 90), ending)
    assert shrink(data, 32, "x") == (data, False)
    assert shrink(data, 31, "x").is_smaller


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
def test_gray_stays_gray(mode: str) -> None:
    levels = photo(48, 64, 1)
    wide = Image.fromarray(levels.astype(np.uint16) * 257)
    image = wide if mode == "I;16" else Image.fromarray(levels).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    with Image.open(io.BytesIO(shrink(file.getvalue(), 24, "x").data)) as opened:
        assert opened.mode == "L"
        assert opened.size == (32, 24)
        got = np.asarray(opened).astype(int)
    if mode != "1":
        assert np.abs(got - cv2.resize(levels, (32, 24), interpolation=cv2.INTER_AREA)).max() <= 1


def test_gray_jpeg_stays_a_gray_jpeg() -> None:
    with Image.open(io.BytesIO(shrink(encode(photo(48, 64, 1)), 24, "x").data)) as opened:
        assert (opened.format, opened.mode) == ("JPEG", "L")


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_other_modes_become_colour(mode: str) -> None:
    colours = Image.fromarray(photo(48, 64)).convert(mode)
    file = io.BytesIO()
    colours.save(file, "JPEG" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(shrink(file.getvalue(), 24, "x").data)) as opened:
        got = np.asarray(opened.convert("RGB")).astype(int)
        assert opened.mode == "RGB"
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        want = mean_of_areas(np.asarray(opened.convert("RGB")), 24, 32)
    assert np.abs(got - want).mean() < 3


def test_the_orientation_of_a_camera_is_ignored() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(photo(40, 80)).save(file, "JPEG", exif=exif)
    with Image.open(io.BytesIO(shrink(file.getvalue(), 20, "x").data)) as opened:
        assert opened.size == (40, 20)
        assert not opened.getexif()
