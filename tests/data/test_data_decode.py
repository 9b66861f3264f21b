import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sanctl.data.decode import ImageError, decode_image, decode_with_format

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(width: int = 101, height: int = 75) -> Image.Image:
    with Image.open(PHOTOGRAPH) as image:
        return image.resize((width, height), Image.Resampling.LANCZOS)


def with_alpha(image: Image.Image) -> Image.Image:
    alpha = np.tile(np.arange(image.width, dtype=np.uint8), (image.height, 1))
    image.putalpha(Image.fromarray(alpha))
    return image


def rotated_by_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


def with_thumbnail(image: Image.Image) -> bytes:
    """The thumbnail is a whole JPEG in a segment of its own before the picture."""
    small = encoded(image.resize((24, 16)), "JPEG")
    segment = b"\xff\xe5" + struct.pack(">H", len(small) + 2) + small
    data = encoded(image, "JPEG")
    return data[:2] + segment + data[2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda i: encoded(i, "JPEG"),
    "jpeg 4:4:4": lambda i: encoded(i, "JPEG", subsampling=0, quality=98),
    "jpeg 4:2:2": lambda i: encoded(i, "JPEG", subsampling=1, quality=40),
    "jpeg progressive": lambda i: encoded(i, "JPEG", progressive=True),
    "jpeg gray": lambda i: encoded(i.convert("L"), "JPEG"),
    "jpeg cmyk": lambda i: encoded(i.convert("CMYK"), "JPEG"),
    "jpeg exif orientation": rotated_by_exif,
    "jpeg with a thumbnail": with_thumbnail,
    "jpeg of several pictures": lambda i: encoded(
        i, "MPO", save_all=True, append_images=[i.rotate(90)]
    ),
    "jpeg with bytes after it": lambda i: encoded(i, "JPEG") + bytes(100),
    "png": lambda i: encoded(i, "PNG"),
    "png gray": lambda i: encoded(i.convert("L"), "PNG"),
    "png alpha": lambda i: encoded(with_alpha(i), "PNG"),
    "png gray alpha": lambda i: encoded(with_alpha(i).convert("LA"), "PNG"),
    "png palette": lambda i: encoded(i.quantize(200), "PNG"),
    "png palette of 4 bits": lambda i: encoded(i.quantize(9), "PNG", bits=4),
    "png palette transparent": lambda i: encoded(i.quantize(99), "PNG", transparency=3),
    "png transparent colour": lambda i: encoded(i, "PNG", transparency=(0, 0, 0)),
    "png 1 bit": lambda i: encoded(i.convert("1"), "PNG"),
    "png animated": lambda i: encoded(i, "PNG", save_all=True, append_images=[i.rotate(90)]),
    "png with bytes after it": lambda i: encoded(i, "PNG") + bytes(100),
    "gif": lambda i: encoded(i, "GIF"),
    "gif animated": lambda i: encoded(i, "GIF", save_all=True, append_images=[i.rotate(90)]),
    "webp": lambda i: encoded(i, "WEBP"),
    "webp lossless alpha": lambda i: encoded(with_alpha(i), "WEBP", lossless=True),
    "tiff": lambda i: encoded(i, "TIFF"),
    "tiff lzw": lambda i: encoded(i, "TIFF", compression="tiff_lzw"),
    "tiff cmyk": lambda i: encoded(i.convert("CMYK"), "TIFF"),
    "tiff alpha": lambda i: encoded(with_alpha(i), "TIFF"),
    "bmp": lambda i: encoded(i, "BMP"),
    "bmp gray": lambda i: encoded(i.convert("L"), "BMP"),
    "bmp 1 bit": lambda i: encoded(i.convert("1"), "BMP"),
    "ppm": lambda i: encoded(i, "PPM"),
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_pillow(kind: str, channels: int) -> None:
    data = KINDS[kind](photograph())
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    pixels = decode_image(data, channels, "x.txt")
    assert pixels.dtype == np.uint8
    assert pixels.shape == (75, 101, channels)
    np.testing.assert_array_equal(pixels, expected.reshape(pixels.shape))


def test_a_whole_photograph() -> None:
    data = PHOTOGRAPH.read_bytes()
    with Image.open(PHOTOGRAPH) as image:
        np.testing.assert_array_equal(decode_image(data, 3, "x"), np.asarray(image))
        np.testing.assert_array_equal(
            decode_image(np.frombuffer(data, np.uint8), 1, "x")[..., 0],
            np.asarray(image.convert("L")),
        )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [3, 1])
def test_gray_of_16_bits_keeps_its_high_byte(kind: str, channels: int) -> None:
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    pixels = decode_image(encoded(Image.fromarray(values), kind), channels, "x")
    np.testing.assert_array_equal(
        pixels, np.repeat((values >> 8).astype(np.uint8)[..., None], channels, axis=2)
    )


def test_colour_of_16_bits_keeps_its_high_byte() -> None:
    import cv2

    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), np.uint16)
    data = cv2.imencode(".png", values)[1].tobytes()
    np.testing.assert_array_equal(decode_image(data, 3, "x"), values[..., ::-1] >> 8)


def test_the_format_comes_from_the_content() -> None:
    assert decode_with_format(encoded(photograph(), "JPEG"), 3, "a.png").format == "JPEG"
    assert decode_with_format(encoded(photograph(), "WEBP"), 3, "a.jpg").format == "WEBP"


TRUNCATABLE = [
    "jpeg",
    "jpeg progressive",
    "jpeg gray",
    "jpeg cmyk",
    "jpeg with a thumbnail",
    "png",
    "png palette",
    "gif",
    "webp",
    "tiff lzw",
    "bmp",
    "ppm",
]


@pytest.mark.parametrize("kind", TRUNCATABLE)
def test_a_truncated_file_is_never_taken_for_whole(kind: str) -> None:
    """Wherever the file ends: an error, or, where only what follows the pixels is lost, all."""
    data = KINDS[kind](photograph(40, 31))
    whole = decode_image(data, 3, "x")
    cuts = {*range(0, len(data), max(1, len(data) // 150)), *range(-20, 0)}
    for cut in cuts:
        with contextlib.suppress(ImageError):
            np.testing.assert_array_equal(decode_image(data[:cut], 3, "x"), whole)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "png"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_truncated_file_is_called_so(kind: str, share: float) -> None:
    data = KINDS[kind](photograph())
    with pytest.raises(ImageError, match=r"a/b\.jpg: the file is truncated"):
        decode_image(data[: int(len(data) * share)], 3, "a/b.jpg")


@pytest.mark.parametrize("zeros", [100, 5000])
@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "jpeg with a thumbnail"])
def test_a_jpeg_whose_end_was_never_written(kind: str, zeros: int) -> None:
    data = KINDS[kind](photograph())
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[: len(data) // 2] + bytes(zeros), 3, "x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"hello, this is no image at all", "not an image"),
        (bytes(1000), "not an image"),
        (b"\xff\xd8\xff\xd9", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png(0, 9, b""), "not an image"),
    ],
)
def test_what_is_not_an_image(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=rf"^some/name\.png: .*{reason}"):
        decode_image(data, 3, "some/name.png")


def test_a_damaged_png() -> None:
    data = bytearray(encoded(photograph(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(bytes(data), 3, "x")


def test_a_header_that_asks_for_too_much_is_refused_without_allocating() -> None:
    jpeg = bytearray(encoded(photograph(), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 50_000, 50_000)
    script = (
        "import resource, sys\n"
        "from sanctl.data.decode import ImageError, decode_image\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    decode_image(data, 3, 'bomb')\n"
        "except ImageError as error:\n"
        "    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    for data in (bytes(jpeg), png(50_000, 50_000, bytes(1000))):
        run = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True)
        message, grown = run.stdout.decode().splitlines()
        assert message.startswith("bomb: its header asks for more than the 178,956,970 pixels")
        assert int(grown) < 64 * 1024  # KiB
        assert run.stderr == b""


def test_an_image_between_pillows_two_limits_loads_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    data = encoded(Image.new("1", (12_000, 8_000)), "PNG")
    assert decode_image(data, 1, "x").shape == (8_000, 12_000, 1)
    assert not recwarn.list


def test_the_libraries_say_nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    bad_profile = chunk(b"iCCP", b"foo\0\0" + zlib.compress(b"bad"))
    decode_image(png(8, 8, bytes(8 * 25), bad_profile), 3, "x")
    jpeg = encoded(photograph(), "JPEG")
    decode_image(jpeg[: len(jpeg) // 2] + b"\xff\xd9", 3, "x")  # "premature end of data segment"
    for data in (encoded(photograph(), "PNG")[:-400], b"nothing"):
        with pytest.raises(ImageError):
            decode_image(data, 3, "x")
    os.write(2, b"the terminal is there again")
    assert capfd.readouterr().err == "the terminal is there again"


def test_decoding_does_not_need_a_standard_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    photograph().save(path)
    script = (
        "import sys\nfrom pathlib import Path\nfrom sanctl.data.decode import decode_image\n"
        "print(decode_image(Path(sys.argv[1]).read_bytes(), 3, 'x').shape)"
    )
    command = f'"{sys.executable}" -c "$0" "$1" 2>&-'
    run = subprocess.run(["sh", "-c", command, script, str(path)], stdout=subprocess.PIPE)
    assert run.stdout.decode().strip() == "(75, 101, 3)"


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a/b.png", "it is gone")))
    assert isinstance(error, ImageError)
    assert str(error).startswith("a/b.png: it is gone")
    assert (error.name, error.reason) == ("a/b.png", "it is gone")
    assert error.exit_status == 2


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["jpeg", "png", "gif", "webp", "tiff lzw", "bmp", "ppm"]),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
    channels=st.sampled_from([1, 3]),
)
def test_damage_gives_pixels_or_an_image_error(
    kind: str, edits: list[tuple[float, int]], channels: int
) -> None:
    data = bytearray(KINDS[kind](photograph(20, 15)))
    for place, value in edits:
        data[int(place * len(data))] = value
    with contextlib.suppress(ImageError):
        pixels = decode_image(bytes(data), channels, "x")
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == channels


@settings(max_examples=100)
@given(data=st.binary(max_size=300), channels=st.sampled_from([1, 3]))
def test_noise_is_not_an_image(data: bytes, channels: int) -> None:
    with pytest.raises(ImageError):
        decode_image(data, channels, "x")
