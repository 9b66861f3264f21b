"""Scores over an epoch, accumulated on the device without ever waiting for it."""

import torch
from torch import Tensor

from sanctl.engine.team import Team


class ClassificationMetrics:
    """Loss, top-1, top-5 and the class confusion of the images seen so far.

    Everything is summed on the device in integers (float64 for the loss), so updates cost no
    synchronisation and the scores do not depend on the batches' sizes or order. torchmetrics
    computes the same values (the tests compare the two), but filters ignored labels and counts
    the confusion in ways that make the host wait for the GPU at every step.

    Args:
        classes: number of classes.
        ignore_label: images with this target are left out of every score.
        device: where logits and targets come from.
    """

    def __init__(self, classes: int, ignore_label: int, device: torch.device) -> None:
        self.classes = classes
        self.ignore_label = ignore_label
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        # Correct among the first 1 and the first 5 predictions, and how many images counted.
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        # Row: true class, column: predicted class. The last row collects the ignored.
        self._confusion = torch.zeros(classes + 1, classes, dtype=torch.int64, device=device)

    def update(
        self, logits: Tensor, targets: Tensor, loss: Tensor, count: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            logits: (N, classes).
            targets: (N,) int64.
            loss: the sum of the losses of the targets that count, divided by `count`; a scalar.
            count: None: how many targets count, so that the loss is their mean.
        """
        logits = logits.detach()
        counted = targets != self.ignore_label
        predictions = logits.topk(min(5, self.classes), dim=1).indices
        hits = (predictions == targets[:, None]) & counted[:, None]
        batch = torch.stack([hits[:, 0].sum(), hits.sum(), counted.sum()])
        self.counts += batch
        self.loss_sum += loss.detach().double() * (batch[2] if count is None else count)
        rows = torch.where(counted, targets, self.classes)
        cells = rows * self.classes + predictions[:, 0]
        self._confusion.view(-1).scatter_add_(0, cells, torch.ones_like(cells))

    @property
    def confusion(self) -> Tensor:
        """(classes, classes) int64: row the true class, column the predicted one."""
        return self._confusion[: self.classes]

    def compute(self) -> dict[str, float]:
        """The scores so far; waits for the device.

        Returns:
            loss; top1 and top5 in percent; and as fractions mIoU (the mean intersection over union
            of the classes), mAcc (the mean accuracy of the classes) and allAcc.
        """
        top1, top5, count = self.counts.tolist()
        iou, accuracy = class_scores(self.confusion)
        return {
            "loss": float(self.loss_sum) / max(count, 1),
            "top1": 100 * top1 / max(count, 1),
            "top5": 100 * top5 / max(count, 1),
            "mIoU": float(iou.mean()),
            "mAcc": float(accuracy.mean()),
            "allAcc": top1 / (count + 1e-10),
        }

    def gather(self, team: Team) -> None:
        """Make the sums those of all processes; each then has the whole."""
        team.sum_(self.loss_sum, self.counts, self._confusion)

    def gathered(self, team: Team) -> dict[str, Tensor]:
        """The sums of all processes as a `state_dict`; those of this one stay as they are."""
        sums = {key: value.clone() for key, value in self.state_dict().items()}
        team.sum_(*sums.values())
        return sums

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far, for a checkpoint in the middle of an epoch."""
        return {"loss_sum": self.loss_sum, "counts": self.counts, "confusion": self._confusion}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`'s sums."""
        self.loss_sum.copy_(state["loss_sum"])
        self.counts.copy_(state["counts"])
        self._confusion.copy_(state["confusion"])


def class_scores(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Per-class intersection over union and accuracy, (classes,) float64 each, on the CPU.

    Args:
        confusion: (classes, classes) counts; row the true class, column the predicted one.
    """
    counts = confusion.double().cpu()
    # As in the original, 1e-10 keeps classes without images and predictions at 0.
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    return hits / (true + predicted - hits + 1e-10), hits / (true + 1e-10)
