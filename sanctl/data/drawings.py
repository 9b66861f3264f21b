"""Sketches of ten shapes, drawn stroke by stroke, for trying everything without a data set.

A shape is a list of strokes (polylines in a unit frame, x to the right, y downwards). To draw one,
every corner is misplaced a little, the line trembles, and the whole is stretched, turned, sized and
placed at random, as a hand would. Turns stay within a quarter of a right angle, so that no shape
becomes another.
"""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""The points of one stroke, (points, 2), as x and y."""
Shape = Callable[[np.random.Generator], list[Points]]

IMAGE_SIDE = 96
_OVERSAMPLING = 4
_CORNER_JITTER = 0.045
_TREMBLE = 0.022
_MAX_TURN_DEGREES = 22.0


def draw_dataset(
    folder: Path,
    images_per_class: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Draws every class into a folder of its own: `folder/circle/0001.png`, ....

    An image depends on the seed, its class and its number alone: the same seed gives the same
    bytes, and asking for more images leaves the first ones as they are.

    Args:
        folder: Where the class folders go; made when missing.
        images_per_class: Images of each of the ten classes.
        seed: Seeds all drawings.
        progress: Called with the number of images drawn since the last call.

    Returns:
        The number of images written.
    """
    for name in SHAPES:
        class_folder = folder / name
        class_folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, images_per_class + 1):
            image = draw_shape(name, seed, number)
            _, png = cv2.imencode(".png", image)
            (class_folder / f"{number:04d}.png").write_bytes(png.tobytes())
            if progress is not None:
                progress(1)
    return images_per_class * len(SHAPES)


def draw_shape(name: str, seed: int, number: int) -> NDArray[np.uint8]:
    """Draws one sketch.

    Args:
        name: One of the keys of `SHAPES`.
        seed: Seeds all drawings.
        number: Which drawing of this class.

    Returns:
        A dark line on white, (96, 96) uint8.
    """
    rng = np.random.default_rng([seed, list(SHAPES).index(name), number])
    strokes = [_tremble(_trace(stroke, rng), rng) for stroke in SHAPES[name](rng)]
    width = rng.uniform(2.0, 4.0)
    return _ink(_place(strokes, width, rng), width, rng)


def _trace(corners: Points, rng: np.random.Generator) -> Points:
    """Misplaces the corners and walks from one to the next in small steps of equal length."""
    jitter = _CORNER_JITTER * min(1.0, np.sqrt(8 / len(corners)))
    corners = corners + rng.normal(0.0, jitter, corners.shape)
    lengths = np.hypot(*np.diff(corners, axis=0).T)
    travelled = np.concatenate([[0.0], np.cumsum(lengths)])
    steps = np.linspace(0.0, travelled[-1], 200)
    path = np.stack([np.interp(steps, travelled, corners[:, axis]) for axis in (0, 1)], axis=1)
    return _round_corners(path)


def _round_corners(path: Points) -> Points:
    window = np.hanning(9)
    padded = np.pad(path, ((4, 4), (0, 0)), mode="edge")
    rounded = [np.convolve(padded[:, axis], window / window.sum(), "valid") for axis in (0, 1)]
    return np.stack(rounded, axis=1)


def _tremble(path: Points, rng: np.random.Generator) -> Points:
    """Adds slow and fast waves along the stroke, the fast ones smaller."""
    length = np.hypot(*np.diff(path, axis=0).T).sum()
    along = np.linspace(0.0, length, len(path))[:, None]
    result = path.copy()
    for frequency in (0.15, 0.3, 0.6, 1.3):
        phase = rng.uniform(0.0, 2 * np.pi, 2)
        amplitude = rng.normal(0.0, _TREMBLE / np.sqrt(6 * frequency), 2)
        result += amplitude * np.sin(2 * np.pi * frequency * along + phase)
    return result


def _place(strokes: list[Points], width: float, rng: np.random.Generator) -> list[Points]:
    """Stretches, turns, sizes and shifts the strokes; they end up in pixels, inside the image."""
    angle = np.deg2rad(rng.uniform(-_MAX_TURN_DEGREES, _MAX_TURN_DEGREES))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.exp(rng.uniform(-0.1, 0.1))
    turned = [(stroke * [stretch, 1 / stretch]) @ turn.T for stroke in strokes]
    points = np.concatenate(turned)
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    room = IMAGE_SIDE - 2 * (width + 1)
    scale = room * rng.uniform(0.6, 1.0) / extent.max()
    corner = width + 1 + rng.uniform(0.0, 1.0, 2) * (room - scale * extent)
    return [(stroke - low) * scale + corner for stroke in turned]


def _ink(strokes: list[Points], width: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws the strokes large and shrinks the picture, which gives widths of fractions of a px."""
    side = IMAGE_SIDE * _OVERSAMPLING
    canvas = np.full((side, side), 255, dtype=np.uint8)
    darkness = int(rng.integers(0, 70))
    for stroke in strokes:
        pixels = np.rint(stroke * _OVERSAMPLING).astype(np.int32)
        thickness = max(1, round(width * _OVERSAMPLING))
        cv2.polylines(canvas, [pixels], isClosed=False, color=darkness, thickness=thickness)
    image = cv2.resize(canvas, (IMAGE_SIDE, IMAGE_SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(image, dtype=np.uint8)


def _corners(*points: tuple[float, float]) -> Points:
    return np.array(points, dtype=np.float64)


def _around(angles: Points, radii: Points | float = 1.0) -> Points:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _arrow(rng: np.random.Generator) -> list[Points]:
    head, half = rng.uniform(0.35, 0.6), rng.uniform(0.3, 0.5)
    shaft = _corners((-1.0, 0.0), (0.0, 0.0), (1.0, 0.0))
    return [shaft, _corners((1.0 - head, -half), (1.0, 0.0), (1.0 - head, half))]


def _circle(rng: np.random.Generator) -> list[Points]:
    start, overlap = rng.uniform(0.0, 2 * np.pi), rng.uniform(-0.15, 0.35)
    return [_around(np.linspace(start, start + 2 * np.pi + overlap, 40))]


def _cross(rng: np.random.Generator) -> list[Points]:
    height, length = rng.uniform(-0.3, 0.0), rng.uniform(0.6, 0.9)
    return [_corners((0.0, -1.0), (0.0, 1.0)), _corners((-length, height), (length, height))]


def _heart(rng: np.random.Generator) -> list[Points]:
    depth = rng.uniform(4.0, 6.0)
    angles = np.linspace(0.0, 2 * np.pi, 60)
    across = 16 * np.sin(angles) ** 3
    up = 13 * np.cos(angles) - depth * np.cos(2 * angles) - 2 * np.cos(3 * angles)
    return [np.stack([across, -up], axis=1) / 16]


def _house(rng: np.random.Generator) -> list[Points]:
    eaves, roof, door = rng.uniform(-0.2, 0.1), rng.uniform(0.0, 0.2), rng.uniform(-0.4, 0.2)
    walls = _corners((-0.8, eaves), (-0.8, 1.0), (0.8, 1.0), (0.8, eaves))
    gable = _corners((-0.8 - roof, eaves), (0.0, -1.0), (0.8 + roof, eaves), (-0.8 - roof, eaves))
    top = eaves + 0.4 * (1.0 - eaves)
    frame = _corners((door, 1.0), (door, top), (door + 0.35, top), (door + 0.35, 1.0))
    return [walls, gable, frame]


def _spiral(rng: np.random.Generator) -> list[Points]:
    start, turns = rng.uniform(0.0, 2 * np.pi), rng.uniform(2.2, 3.2)
    way = rng.choice([-1.0, 1.0])
    along = np.linspace(0.0, 1.0, 90)
    return [_around(start + way * 2 * np.pi * turns * along, 0.05 + 0.95 * along)]


def _square(rng: np.random.Generator) -> list[Points]:
    corners = _corners((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
    corners = np.roll(corners, rng.integers(4), axis=0)
    return [np.concatenate([corners, corners[:1]])]


def _star(rng: np.random.Generator) -> list[Points]:
    inner = rng.uniform(0.36, 0.48)
    radii = np.where(np.arange(11) % 2 == 0, 1.0, inner)
    return [_around(np.linspace(0.0, 2 * np.pi, 11) - np.pi / 2, radii)]


def _triangle(rng: np.random.Generator) -> list[Points]:
    tip = rng.uniform(-0.3, 0.3)
    corners = _corners((tip, -0.9), (1.0, 0.9), (-1.0, 0.9))
    corners = np.roll(corners, rng.integers(3), axis=0)
    return [np.concatenate([corners, corners[:1]])]


def _zigzag(rng: np.random.Generator) -> list[Points]:
    points, height = int(rng.integers(6, 10)), rng.uniform(0.3, 0.55)
    side = rng.choice([-1.0, 1.0])
    up = side * height * (-1.0) ** np.arange(points)
    return [np.stack([np.linspace(-1.0, 1.0, points), up], axis=1)]


SHAPES: dict[str, Shape] = {
    "arrow": _arrow,
    "circle": _circle,
    "cross": _cross,
    "heart": _heart,
    "house": _house,
    "spiral": _spiral,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
    "zigzag": _zigzag,
}
"""The classes, in sorted order, and how each is drawn."""
