from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as pil_transforms

from sanctl.data.decode import decode_image
from sanctl.data.normalize import Normalizer
from sanctl.data.transforms import eval_transform, train_transform

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def texture(width: int, height: int) -> Image.Image:
    """Waves of many lengths and directions, edges and noise."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * rng.normal() * 2 + y * rng.normal() * 2) for _ in range(3)]
    pixels = np.stack(waves, axis=-1) * 100 + 128 + rng.normal(0, 20, (height, width, 3))
    pixels[height // 3 :, width // 2 :] = 255 - pixels[height // 3 :, width // 2 :]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def written(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def difference(path: Path, channels: int, resize: int, size: int) -> np.ndarray:
    """Ours against Pillow and torchvision on Pillow images, 0..255."""
    pixels = torch.from_numpy(decode_image(path.read_bytes(), channels, str(path)))
    ours = eval_transform(resize, size)(pixels.permute(2, 0, 1)).permute(1, 2, 0).numpy()
    pipeline = pil_transforms.Compose(
        [pil_transforms.Resize(resize), pil_transforms.CenterCrop(size)]
    )
    with Image.open(path) as image:
        theirs = np.asarray(pipeline(image.convert("RGB" if channels == 3 else "L")))
    assert ours.shape == (size, size, channels)
    return np.abs(ours.astype(int) - theirs.reshape(ours.shape))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (73, 64), (700, 600), (64, 100)])
def test_evaluation_of_a_photograph_gives_pillows_pixels(
    channels: int, resize: int, size: int
) -> None:
    error = difference(PHOTOGRAPH, channels, resize, size)
    assert error.mean() < 0.25  # 1 is promised; the libraries round differently
    assert error.max() <= 2


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize(
    ("width", "height"),
    [(500, 375), (375, 500), (333, 500), (256, 256), (1024, 200), (90, 61), (33, 32), (2000, 31)],
)
def test_evaluation_of_textures_gives_pillows_pixels(
    width: int, height: int, ending: str, tmp_path: Path
) -> None:
    path = written(texture(width, height), tmp_path / f"x.{ending}")
    error = difference(path, 3, 256, 224)
    assert error.mean() < 0.25
    assert error.max() <= 2


def test_an_image_smaller_than_the_crop_is_padded() -> None:
    image = torch.full((3, 20, 20), 200, dtype=torch.uint8)
    out = eval_transform(16, 32)(image)
    assert out.shape == (3, 32, 32)
    assert (out[:, 8:24, 8:24] == 200).all()
    assert out.sum() == 200 * 3 * 16 * 16


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(60, 80), (1, 50), (5, 3), (300, 20)])
def test_training_gives_a_square_of_uint8(channels: int, height: int, width: int) -> None:
    image = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)
    out = train_transform(32)(image)
    assert out.shape == (channels, 32, 32)
    assert out.dtype == torch.uint8


def test_training_crops_and_flips() -> None:
    """A ramp shows where a crop lies, how much it covers, and which way round it is."""
    ramp = torch.arange(256, dtype=torch.uint8).repeat(256, 1)[None]
    transform = train_transform(64)
    rows = torch.stack([transform(ramp)[0, 0].float() for _ in range(400)])
    flipped = rows[:, 0] > rows[:, -1]
    assert 140 < flipped.sum() < 260
    share = (rows[:, 0] - rows[:, -1]).abs() / 255
    # Area 8 % to 100 % at ratios of 3/4 to 4/3: a width of sqrt(0.08 * 3/4) or more.
    assert 0.2 < share.min() < 0.4
    assert share.max() > 0.9
    middles = rows.mean(dim=1)
    assert middles.min() < 90
    assert middles.max() > 165


def test_training_resizes_with_antialiasing() -> None:
    stripes = (torch.arange(640) % 2 * 255).to(torch.uint8).repeat(640, 1)[None]
    torch.manual_seed(0)
    crops = torch.stack([train_transform(16)(stripes) for _ in range(20)]).float()
    assert (crops - 127.5).abs().max() < 30  # without it the stripes alias to black and white


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_normalisation_against_torchvision() -> None:
    images = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8)
    expected = pil_transforms.Normalize(MEAN, STD)(images.double() / 255)
    out = Normalizer(MEAN, STD)(images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_one_mean_serves_all_channels() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    out = Normalizer([0.5], [0.25])(images)
    torch.testing.assert_close(out, (images / 255 - 0.5) / 0.25)


def test_normalisation_keeps_its_precision_under_autocast() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    normalizer = Normalizer(MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = normalizer(images)
    torch.testing.assert_close(out, normalizer(images), rtol=0, atol=0)


def test_normalisation_leaves_no_trace_in_a_checkpoint() -> None:
    assert not Normalizer(MEAN, STD).state_dict()


def test_normalisation_keeps_channels_last() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8).to(memory_format=torch.channels_last)
    assert Normalizer(MEAN, STD)(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5, 0.5]), ([0.5], [0.0]), ([0.5], [-1.0])])
def test_normalisation_refuses_what_makes_no_sense(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match="std"):
        Normalizer(mean, std)
