"""The training loss: cross-entropy with label smoothing and mixup."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    smoothing: float,
    ignore_label: int,
    count: Tensor | None = None,
) -> Tensor:
    """Cross-entropy against 1 - eps on the target and eps / (classes - 1) on each other class.

    (torch's own smoothing is another: it puts eps / classes on every class, the target included.)

    Args:
        logits: (N, classes), a floating type.
        targets: (N,) int64.
        smoothing: eps, in [0, 1).
        ignore_label: targets of this value do not count.
        count: what to divide the sum by, a scalar: for a part of a batch, how many targets of the
            whole batch count. None: how many of these do.

    Returns:
        The mean over the targets that count, a scalar; 0 where none does.
    """
    counted = targets != ignore_label
    if count is None:
        count = counted.sum()
    others = smoothing / (logits.shape[1] - 1)
    wanted = torch.full_like(logits, others, dtype=torch.promote_types(logits.dtype, torch.float32))
    wanted.scatter_(1, targets.where(counted, 0)[:, None], 1 - smoothing)
    total = F.cross_entropy(logits.to(wanted.dtype), wanted * counted[:, None], reduction="sum")
    return total / count.clamp(min=1)


class Mixup(NamedTuple):
    """One batch's draw of mixup (Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018).

    The loss is lam * L(own targets) + (1 - lam) * L(partners' targets).

    Attributes:
        lam: the share of each image itself; 1 - lam is its partner's.
        partners: (N,) int64, which image of the batch is mixed into each.
    """

    lam: float
    partners: Tensor

    @classmethod
    def draw(
        cls,
        alpha: float,
        batch_size: int,
        seed: tuple[int, ...],
        device: torch.device,
        rank: int = 0,
    ) -> "Mixup":
        """Draw lam from Beta(alpha, alpha) and a permutation, as a function of the seed and rank.

        Of several processes each has a permutation of its own images, and all have one lam: the
        partners, unlike all else, depend on how many processes there are.

        Args:
            alpha: parameter of the Beta distribution, above 0.
            batch_size: N.
            seed: (seed, epoch, step): a resumed run draws what an uninterrupted one does.
            device: where the images are.
            rank: of this process.
        """
        generator = np.random.default_rng(seed)
        lam = float(generator.beta(alpha, alpha))
        if rank:
            generator = np.random.default_rng((*seed, rank))
        partners = torch.from_numpy(generator.permutation(batch_size))
        return cls(lam, partners.to(device, non_blocking=True))  # the host waits for nothing

    def mix(self, images: Tensor) -> Tensor:
        """Mix each image with its partner; images: (N, C, H, W)."""
        return images.mul(self.lam).add_(images[self.partners], alpha=1 - self.lam)

    def partner_targets(self, targets: Tensor) -> Tensor:
        """The targets (N,) of each image's partner."""
        return targets[self.partners]
