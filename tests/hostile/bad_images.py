"""Folders of small images of which some are bad, in five ways."""

import hashlib
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np

KINDS = ("zero bytes", "truncated", "text", "bomb", "symlink loop")
BOMB_SIDE = 50_000
CLASSES = 10
PNG = cv2.imencode(".png", np.full((2, 2), 200, np.uint8))[1].tobytes()
"""A whole image of 2 x 2 px."""


def write_images(root: Path, count: int, bad: int = 0, seed: int = 0) -> dict[Path, str]:
    """Write class folders of different images; return the bad ones with their kind.

    Args:
        root: The folder of class folders; made.
        count: Number of images, the bad ones included.
        bad: How many of them are bad, spread evenly; the kinds take turns.
        seed: Draws the pixels.
    """
    generator = np.random.default_rng(seed)
    places = {count * number // bad: KINDS[number % len(KINDS)] for number in range(bad)}
    made = {}
    for number in range(count):
        ending = (".png", ".jpg")[number // CLASSES % 2]
        path = root / f"class{number % CLASSES}" / f"{number:05}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
        path.write_bytes(cv2.imencode(ending, pixels)[1].tobytes())
        if number in places:
            spoil(path, places[number])
            made[path] = places[number]
    return made


def spoil(path: Path, kind: str) -> None:
    """Make a whole image a bad one."""
    whole = path.read_bytes()
    if kind == "symlink loop":
        path.unlink()
        path.symlink_to(path.name)
        return
    path.write_bytes(
        {
            "zero bytes": b"",
            "truncated": whole[: len(whole) * 2 // 3],
            "text": b"<html>404: there is no such image</html>\n",
            "bomb": bomb_png() if path.suffix == ".png" else bomb_jpeg(whole),
        }[kind]
    )


def bomb_png() -> bytes:
    """A PNG of some hundred bytes whose header declares 50,000 x 50,000 px of colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 8, 2, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        chunk(b"IDAT", zlib.compress(bytes(99_999))),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb_jpeg(whole: bytes) -> bytes:
    """A JPEG whose header declares 50,000 x 50,000 px instead of its own size."""
    place = whole.index(b"\xff\xc0") + 5
    return whole[:place] + struct.pack(">HH", BOMB_SIDE, BOMB_SIDE) + whole[place + 4 :]


def snapshot(root: Path) -> dict[str, str]:
    """What every file below a folder is: a digest of its bytes and its time, or where it links."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        elif path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = f"{digest} {path.stat().st_mtime_ns}"
    return found
