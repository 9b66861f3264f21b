"""Testing a checkpoint: every image once, scores overall and by class, the worst mistakes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import torch

from sanctl.config.schema import Config
from sanctl.data.loader import BatchDataset, eval_loader
from sanctl.data.source import ImageSource, Split, open_source
from sanctl.data.transforms import eval_transform
from sanctl.engine.checkpoint import Checkpoint
from sanctl.engine.device import Precision, place, prepare_backends
from sanctl.engine.losses import smoothed_cross_entropy
from sanctl.engine.metrics import ClassificationMetrics, class_scores
from sanctl.engine.resume import require_same_classes
from sanctl.engine.run import build_network, input_pipe
from sanctl.engine.skipped import FILE, SkippedImages
from sanctl.engine.state import load_weights
from sanctl.engine.steps import infer
from sanctl.errors import SanctlError, UserError
from sanctl.report.plots import Mistake, plot_confusion, plot_mistakes
from sanctl.report.records import ClassScore, OverallScore

SHOWN_MISTAKES = 25
# File names that are no valid UTF-8 are written as they are.
_ODD_NAMES: Final = "surrogateescape"


@dataclass
class Predictions:
    """What a network said of the images of a split.

    Attributes:
        numbers: (N,) int64, the images' numbers; those that cannot be read are not among them.
        targets: (N,) int64, true classes.
        top: (N, up to 5) int64, predicted classes, the likeliest first.
        confidence: (N,) float32, the softmax of the first.
    """

    numbers: np.ndarray
    targets: np.ndarray
    top: np.ndarray
    confidence: np.ndarray

    def worst(self, ignore_label: int) -> np.ndarray:
        """Positions of the mistakes, the most confident first."""
        counted = self.targets != ignore_label
        wrong = np.flatnonzero((self.top[:, 0] != self.targets) & counted)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


@dataclass(frozen=True)
class TestResult:
    """The outcome of a test.

    Attributes:
        checkpoint: the file that was tested, and the epoch of its weights (0: not known).
        split: which images.
        overall, per_class: the scores.
        mistakes: how many images were given another class.
        folder: where per_class.csv, predictions.csv and the pictures lie.
    """

    __test__ = False

    checkpoint: Path
    epoch: int
    split: Split
    overall: OverallScore
    per_class: list[ClassScore]
    mistakes: int
    folder: Path


def open_test_source(config: Config) -> tuple[ImageSource, Split]:
    """The images to test on: validation or test, as TEST.use_val_set says.

    Raises:
        UserError: there are none.
    """
    split: Split = "val" if config.TEST.use_val_set else "test"
    return open_source(config.DATA, split), split


def run_test(
    config: Config,
    saved: Checkpoint,
    path: Path,
    source: ImageSource,
    split: Split,
    folder: Path,
    device: torch.device,
    on_images: Callable[[int], None],
    note: Callable[[str], None],
) -> TestResult:
    """Test a checkpoint and write the results.

    Args:
        config: how to build the network and where the images are.
        saved: the checkpoint.
        path: its file.
        source: the images, from `open_test_source`.
        split: what the images are called.
        folder: where to write; made if missing.
        device: what to compute on.
        on_images: called with the number of images after each step.
        note: takes a sentence for the user.

    Raises:
        SanctlError: no image can be read.
        UserError: the checkpoint does not fit the configuration or the images.
    """
    require_same_classes(saved, source.classes, path)
    prepare_backends(config.TRAIN, device)
    model = build_network(config)
    load_weights(model, saved.weights(), path)
    model = place(model, device, config.TRAIN.channels_last).eval()

    metrics = ClassificationMetrics(len(source.classes), config.TRAIN.ignore_label, device)
    (folder / FILE).unlink(missing_ok=True)  # of an earlier test
    skipped = SkippedImages(folder, split, note)
    predictions = _predict(config, model, source, device, metrics, on_images, skipped)
    overall, per_class = _scores(metrics, predictions, source.classes)
    worst = predictions.worst(config.TRAIN.ignore_label)
    _write(folder, config, source, metrics, predictions, worst, per_class)
    return TestResult(path, saved.epoch, split, overall, per_class, len(worst), folder)


def _predict(
    config: Config,
    model: torch.nn.Module,
    source: ImageSource,
    device: torch.device,
    metrics: ClassificationMetrics,
    on_images: Callable[[int], None],
    skipped: SkippedImages,
) -> Predictions:
    batches = eval_loader(
        source,
        config.DATA,
        batch_size=config.TEST.batch_size_test,
        workers=config.TEST.test_workers,
    )
    shown = min(5, len(source.classes))
    seen = np.zeros(len(source), dtype=np.int64)
    top = np.zeros((len(source), shown), dtype=np.int64)
    confidence = np.zeros(len(source), dtype=np.float32)
    precision = Precision.choose(config.TRAIN.amp, device)
    pipe = input_pipe(config, device)
    ignore = config.TRAIN.ignore_label
    usable = filter(None, skipped.usable(batches))
    for batch, logits, targets in infer(model, usable, pipe, precision):
        metrics.update(logits, targets, smoothed_cross_entropy(logits, targets, 0.0, ignore))
        share, classes = logits.softmax(1).topk(shown, dim=1)
        rows = batch.indices.numpy()
        seen[rows] += 1
        top[rows] = classes.cpu().numpy()
        confidence[rows] = share[:, 0].cpu().numpy()
        on_images(len(rows))
    numbers = np.flatnonzero(seen)
    if seen.max() > 1 or len(numbers) + len(skipped.numbers) != len(source):
        raise SanctlError("not every image was tested exactly once")
    return Predictions(numbers, source.targets[numbers], top[numbers], confidence[numbers])


def _scores(
    metrics: ClassificationMetrics, predictions: Predictions, classes: list[str]
) -> tuple[OverallScore, list[ClassScore]]:
    values = metrics.compute()
    overall = OverallScore(
        images=int(metrics.confusion.sum()),
        loss=values["loss"],
        top1=values["top1"],
        top5=values["top5"],
        mean_iou=values["mIoU"],
        mean_accuracy=values["mAcc"],
        accuracy=values["allAcc"],
    )
    iou, accuracy = class_scores(metrics.confusion)
    images = metrics.confusion.sum(1).tolist()
    in_top5 = (predictions.top == predictions.targets[:, None]).any(1)
    return overall, [
        ClassScore(
            name=name,
            images=images[index],
            top1=100 * float(accuracy[index]),
            top5=100 * float(in_top5[predictions.targets == index].mean()) if images[index] else 0,
            iou=float(iou[index]),
        )
        for index, name in enumerate(classes)
    ]


def _write(
    folder: Path,
    config: Config,
    source: ImageSource,
    metrics: ClassificationMetrics,
    predictions: Predictions,
    worst: np.ndarray,
    per_class: list[ClassScore],
) -> None:
    classes = source.classes
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(
        {
            "class": [score.name for score in per_class],
            "images": [score.images for score in per_class],
            "top1": [score.top1 for score in per_class],
            "top5": [score.top5 for score in per_class],
            "iou": [score.iou for score in per_class],
        }
    ).to_csv(folder / "per_class.csv", index=False, errors=_ODD_NAMES)
    pd.DataFrame(
        {
            "image": [source.name(index) for index in predictions.numbers],
            "true": [_name(classes, target) for target in predictions.targets],
            "predicted": [classes[index] for index in predictions.top[:, 0]],
            "confidence": predictions.confidence,
            "correct": predictions.top[:, 0] == predictions.targets,
        }
    ).to_csv(folder / "predictions.csv", index=False, errors=_ODD_NAMES)
    plot_confusion(metrics.confusion.cpu().numpy(), classes, folder / "confusion_matrix.png")
    plot_mistakes(_worst_mistakes(config, source, predictions, worst), folder / "mistakes.png")


def _worst_mistakes(
    config: Config, source: ImageSource, predictions: Predictions, worst: np.ndarray
) -> list[Mistake]:
    """The most confident mistakes, each with the pixels that the network saw."""
    transform = eval_transform(config.DATA.resize, config.DATA.image_size)
    dataset = BatchDataset(source, transform, config.DATA.in_chans, seed=None)
    mistakes = []
    for index in worst[:SHOWN_MISTAKES].tolist():
        batch = dataset[[(0, int(predictions.numbers[index]))]]
        if isinstance(batch, UserError):  # readable a moment ago: the file was changed meanwhile
            raise batch
        mistakes.append(
            Mistake(
                image=batch.images[0].permute(1, 2, 0).numpy(),
                true_name=_name(source.classes, predictions.targets[index]),
                predicted_name=source.classes[predictions.top[index, 0]],
                confidence=float(predictions.confidence[index]),
            )
        )
    return mistakes


def _name(classes: list[str], target: int) -> str:
    """The name of a class; the label to be ignored has none."""
    return classes[target] if 0 <= target < len(classes) else f"ignored ({target})"
