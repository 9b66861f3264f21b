"""The pictures of a run: curves over the epochs, the confusion matrix, the worst mistakes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation, Transform

from sanctl.report.console import shorten
from sanctl.report.figure import GRAY, TRAIN_COLOUR, VAL_COLOUR, figure_file

_MARKED_EPOCHS = 30
_WRITTEN_CLASSES = 20
_LISTED_CONFUSIONS = 25
_SMALLEST_TYPE = 4.0
_TICKS = (0, 0.25, 0.5, 0.75, 1)
_ROOT_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)


def plot_curves(metrics_csv: Path, out_dir: Path) -> list[Path]:
    """Draw what `metrics.csv` holds over the epochs.

    Args:
        metrics_csv: The file; one without rows gives no picture.
        out_dir: Where `loss.png`, `accuracy.png` and `learning_rate.png` go.

    Returns:
        The files written.
    """
    metrics = pd.read_csv(metrics_csv)
    if metrics.empty:
        return []
    paths = [out_dir / f"{name}.png" for name in ("loss", "accuracy", "learning_rate")]
    with figure_file(paths[0], 6.4, 4.0) as figure:
        axes = _epoch_axes(figure, metrics, "loss")
        _curve(axes, metrics, "loss_train", "training", TRAIN_COLOUR)
        _curve(axes, metrics, "loss_val", "validation", VAL_COLOUR)
        axes.legend()
    with figure_file(paths[1], 6.4, 4.0) as figure:
        _draw_accuracy(figure, metrics)
    with figure_file(paths[2], 6.4, 3.0) as figure:
        axes = _epoch_axes(figure, metrics, "learning rate")
        _curve(axes, metrics, "lr", "learning rate", TRAIN_COLOUR)
        axes.set_ylim(bottom=0)
    return paths


def _draw_accuracy(figure: Figure, metrics: pd.DataFrame) -> None:
    axes = _epoch_axes(figure, metrics, "accuracy")
    for part, word, colour in (
        ("train", "training", TRAIN_COLOUR),
        ("val", "validation", VAL_COLOUR),
    ):
        _curve(axes, metrics, f"top5_{part}", f"{word} top-5", colour, "--")
        _curve(axes, metrics, f"top1_{part}", f"{word} top-1", colour)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_ylim(top=min(102.0, axes.get_ylim()[1]))
    column = "top1_val" if "top1_val" in metrics else "top1_train"
    if column in metrics and metrics[column].notna().any():
        best = metrics.iloc[int(np.nanargmax(metrics[column].to_numpy()))]
        axes.plot(best["epoch"], best[column], "o", color="black", markersize=5, zorder=3)
        axes.set_title(f"best top-1: {best[column]:.2f}% in epoch {best['epoch']:.0f}")
    axes.legend(loc="lower right")


def _epoch_axes(figure: Figure, metrics: pd.DataFrame, quantity: str) -> Axes:
    axes = figure.add_subplot()
    axes.set(xlabel="epoch", ylabel=quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    if len(metrics) == 1:
        epoch = metrics["epoch"].iloc[0]
        axes.set_xlim(epoch - 1, epoch + 1)
    return axes


def _curve(
    axes: Axes, metrics: pd.DataFrame, column: str, label: str, colour: str, line: str = "-"
) -> None:
    if column in metrics:
        marker = "o" if len(metrics) <= _MARKED_EPOCHS else None
        axes.plot(metrics["epoch"], metrics[column], line, color=colour, label=label, marker=marker)


class Mistake(NamedTuple):
    """An image that the network got wrong.

    Attributes:
        image: uint8, (H, W, C) with 1 or 3 channels (RGB).
        true_name: Its class.
        predicted_name: The class that the network gave it.
        confidence: The probability that it gave this class, 0 to 1.
    """

    image: np.ndarray
    true_name: str
    predicted_name: str
    confidence: float


def plot_mistakes(items: Sequence[Mistake], path: Path) -> None:
    """Draw images in a grid, each with its class above and the predicted one below.

    Args:
        items: The mistakes, worst first; where there are none, the picture says so.
        path: The PNG file.
    """
    columns = min(8, len(items), math.ceil(math.sqrt(1.6 * len(items)))) or 1
    rows = math.ceil(len(items) / columns) or 1
    with figure_file(path, max(3.2, 1.45 * columns), 0.45 + 1.75 * rows) as figure:
        if not items:
            frame = figure.add_subplot(xticks=[], yticks=[])
            frame.spines[:].set_visible(True)
            frame.text(0.5, 0.5, "no mistakes", ha="center", va="center", color=GRAY)
            return
        figure.set_layout_engine("constrained", hspace=0.1, h_pad=0.07)
        title = "above: true class; below: predicted class and its probability"
        figure.suptitle(title, fontsize=8, color=GRAY)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, item in zip(grid.flat, items, strict=False):
            _draw_mistake(axes, item)
        for axes in grid.flat[len(items) :]:
            axes.set_axis_off()


def _draw_mistake(axes: Axes, item: Mistake) -> None:
    image = item.image[..., 0] if item.image.shape[2] == 1 else item.image
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    # A square frame for every image, whatever its sides, so that the texts stand in rows.
    axes.set(xticks=[], yticks=[], box_aspect=1, facecolor="#f4f4f4")
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set(visible=True, color="#c8c8c8")
    axes.set_title(shorten(item.true_name, 18), fontsize=8, loc="center", pad=3)
    predicted = f"{shorten(item.predicted_name, 18)}\n{item.confidence:.0%}"
    axes.set_xlabel(predicted, fontsize=8, labelpad=3, color=VAL_COLOUR)


def plot_confusion(matrix: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix, every row divided by its sum.

    Up to twenty classes have the percentages written into the cells. Names stand at the axes as
    long as they can be read, class numbers beyond; beside a larger matrix stand the most frequent
    confusions. A class without images has a gray row.

    Args:
        matrix: (classes, classes) counts; row = class, column = predicted class.
        classes: The class names.
        path: The PNG file.

    Raises:
        ValueError: The matrix does not fit the classes.
    """
    n = len(classes)
    if matrix.shape != (n, n):
        raise ValueError(f"a confusion matrix of {n} classes is {(n, n)}, not {matrix.shape}")
    counts = matrix.astype(np.float64)
    images = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, images, out=np.full_like(counts, np.nan), where=images > 0)
    written = n <= _WRITTEN_CLASSES
    side = max(2.4, 0.42 * n) if written else min(10.0, max(5.0, 0.1 * n))
    with figure_file(path, side, side) as figure:
        # The matrix fills the figure; names, colour bar and list stand around it.
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        _draw_matrix(figure, axes, shares, side)
        _name_classes(axes, classes, points_per_class=72 * side / n)
        accuracy = np.trace(counts) / max(counts.sum(), 1)
        axes.set_title(f"{counts.sum():,.0f} images, {accuracy:.2%} correct")
        if written:
            _write_shares(axes, shares)
        else:
            list_at = axes.transAxes + ScaledTranslation(1.05, 0, figure.dpi_scale_trans)
            _list_confusions(axes, list_at, counts, classes)


def _draw_matrix(figure: Figure, axes: Axes, shares: np.ndarray, side: float) -> None:
    """Draw the matrix and, 0.15 inches beside it, the colour bar."""
    # The few percent that a confusion has among many classes would be white on a linear scale.
    linear = len(shares) <= _WRITTEN_CLASSES
    norm, ticks = (Normalize(0, 1), _TICKS) if linear else (PowerNorm(0.5, 0, 1), _ROOT_TICKS)
    colours = mpl.colormaps["Blues"].with_extremes(bad="#e8e8e8")
    picture = axes.imshow(shares, cmap=colours, norm=norm, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class (each row sums to 100%)")
    axes.spines[:].set_visible(True)
    bar_axes = figure.add_axes((1 + 0.15 / side, 0, 0.13 / side, 1))
    bar = figure.colorbar(picture, cax=bar_axes, ticks=ticks, format=PercentFormatter(1, 0))
    bar.outline.set_visible(False)
    bar.minorticks_off()


def _name_classes(axes: Axes, classes: Sequence[str], points_per_class: float) -> None:
    """Write the names at both axes where they can be read, and the class numbers elsewhere."""
    size = min(9.0, 0.85 * points_per_class)
    if size < _SMALLEST_TYPE:
        axes.set(xlabel="predicted class (number, from 0)", ylabel="true class (number, from 0)")
        return
    names = [shorten(name, 20) for name in classes]
    places = range(len(names))
    axes.set_xticks(places, names, fontsize=size, rotation=90)
    axes.set_yticks(places, names, fontsize=size)
    axes.tick_params(length=min(3.0, 0.3 * size), pad=1.5)


def _write_shares(axes: Axes, shares: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            colour = "white" if share > 0.55 else "black"
            text = f"{100 * share:.0f}" if share >= 0.01 else "<1"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def _list_confusions(
    axes: Axes, transform: Transform, counts: np.ndarray, classes: Sequence[str]
) -> None:
    """Write the confusions with the most images, most first."""
    wrong = counts * (1 - np.eye(len(classes)))
    images = counts.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED_CONFUSIONS]
    lines = [
        f"{wrong[row, column]:.0f} of {images[row]:.0f}:  "
        f"{shorten(classes[row], 20)} → {shorten(classes[column], 20)}"
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
    text = "\n".join(["most frequent confusions (true → predicted)", "", *lines])
    axes.text(1, 1, text, va="top", fontsize=8, linespacing=1.5, transform=transform)
