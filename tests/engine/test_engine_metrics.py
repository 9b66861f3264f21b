import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
)

from sanctl.engine.losses import smoothed_cross_entropy
from sanctl.engine.metrics import ClassificationMetrics, class_scores

IGNORE = 99
CPU = torch.device("cpu")


def score(
    logits: torch.Tensor, targets: torch.Tensor, classes: int, sizes: list[int]
) -> ClassificationMetrics:
    metrics = ClassificationMetrics(classes, IGNORE, CPU)
    for part, goal in zip(logits.split(sizes), targets.split(sizes), strict=True):
        metrics.update(part, goal, smoothed_cross_entropy(part, goal, 0.0, IGNORE))
    return metrics


def oracle(logits: torch.Tensor, targets: torch.Tensor, classes: int) -> dict[str, float]:
    """The same scores by torchmetrics, over all images at once."""

    def run(metric: torch.nn.Module) -> torch.Tensor:
        result: torch.Tensor = metric(logits, targets)
        return result

    top = {
        k: run(MulticlassAccuracy(classes, top_k=k, average="micro", ignore_index=IGNORE))
        for k in (1, min(5, classes))
    }
    # Per class, and averaged here: torchmetrics leaves absent classes out, the original counts 0.
    iou = run(MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORE))
    accuracy = run(MulticlassAccuracy(classes, average="none", ignore_index=IGNORE))
    counted = targets != IGNORE
    losses = torch.nn.functional.cross_entropy(
        logits.double(), targets, ignore_index=IGNORE, reduction="none"
    )
    return {
        "loss": float(losses[counted].mean()),
        "top1": 100 * float(top[1]),
        "top5": 100 * float(top[min(5, classes)]),
        "mIoU": float(iou.mean()),
        "mAcc": float(accuracy.mean()),
        "allAcc": float(top[1]),
    }


@given(data=st.data())
def test_scores_agree_with_torchmetrics_whatever_the_batches(data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 9), "classes")
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5), "batch sizes")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    n = sum(sizes)
    logits = torch.tensor(rng.normal(size=(n, classes)), dtype=torch.float32)
    present = data.draw(st.integers(1, classes), "classes with images")
    targets = torch.tensor(np.where(rng.random(n) < 0.2, IGNORE, rng.integers(0, present, n)))
    targets[0] = 0  # at least one image counts
    found = score(logits, targets, classes, sizes).compute()
    expected = oracle(logits, targets, classes)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_confusion_agrees_with_torchmetrics() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 6), torch.randint(0, 6, (50,))
    targets[::7] = IGNORE
    metrics = score(logits, targets, 6, [20, 20, 10])
    expected = MulticlassConfusionMatrix(6, ignore_index=IGNORE)(logits, targets)
    assert torch.equal(metrics.confusion, expected)
    iou, accuracy = class_scores(metrics.confusion)
    theirs = MulticlassJaccardIndex(6, average="none", ignore_index=IGNORE)(logits, targets)
    torch.testing.assert_close(iou.float(), theirs)
    theirs = MulticlassAccuracy(6, average="none", ignore_index=IGNORE)(logits, targets)
    torch.testing.assert_close(accuracy.float(), theirs)


def test_the_order_and_size_of_batches_change_nothing() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(30, 4), torch.randint(0, 4, (30,))
    whole = score(logits, targets, 4, [30]).compute()
    order = torch.randperm(30)
    parts = score(logits[order], targets[order], 4, [1, 13, 16]).compute()
    assert {k: v for k, v in whole.items() if k != "loss"} == {
        k: v for k, v in parts.items() if k != "loss"
    }
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-6)


def test_a_batch_of_ignored_images_changes_nothing() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 3), torch.randint(0, 3, (8,))
    metrics = score(logits, targets, 3, [8])
    before = metrics.compute()
    ignored = torch.full((4,), IGNORE)
    metrics.update(torch.randn(4, 3), ignored, smoothed_cross_entropy(logits[:4], ignored, 0.0, 99))
    assert metrics.compute() == before


def test_nothing_seen_scores_zero() -> None:
    assert set(ClassificationMetrics(3, IGNORE, CPU).compute().values()) == {0.0}


def test_an_interrupted_epoch_goes_on_from_the_state_dict() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 4), torch.randint(0, 4, (12,))
    targets[3] = IGNORE
    half = score(logits[:5], targets[:5], 4, [5])
    resumed = ClassificationMetrics(4, IGNORE, CPU)
    resumed.load_state_dict({key: value.clone() for key, value in half.state_dict().items()})
    resumed.update(
        logits[5:], targets[5:], smoothed_cross_entropy(logits[5:], targets[5:], 0.0, IGNORE)
    )
    whole = score(logits, targets, 4, [5, 7])
    assert resumed.compute() == whole.compute()
    assert torch.equal(resumed.confusion, whole.confusion)


def test_updates_keep_no_graph() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 0])
    metrics = ClassificationMetrics(3, IGNORE, CPU)
    metrics.update(logits, targets, smoothed_cross_entropy(logits, targets, 0.1, IGNORE))
    assert not any(value.requires_grad for value in metrics.state_dict().values())
