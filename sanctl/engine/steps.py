"""One training step and one pass over evaluation data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sanctl.config.schema import TrainConfig
from sanctl.data.loader import Batch
from sanctl.data.normalize import Normalizer
from sanctl.engine.device import Precision
from sanctl.engine.losses import Mixup, smoothed_cross_entropy
from sanctl.engine.state import TrainState
from sanctl.engine.team import Team

Forward = Callable[[Tensor], Tensor]


class InputPipe:
    """Brings uint8 batches to the device and makes them the network's input.

    Args:
        normalizer: (x / 255 - mean) / std, on the device.
        device: where the network is.
        channels_last: the memory format of the input.
    """

    def __init__(self, normalizer: Normalizer, device: torch.device, channels_last: bool) -> None:
        self._normalizer = normalizer.to(device)
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the input (N, C, H, W) float32 and the targets (N,) int64 of a batch."""
        images = batch.images.to(self._device, non_blocking=True)
        targets = batch.targets.to(self._device, non_blocking=True)
        return self._normalizer(images).contiguous(memory_format=self._format), targets


class StepResult(NamedTuple):
    """What a training step leaves, without a graph.

    Attributes:
        logits: (N, classes), of this process's images.
        mean_loss: a scalar: the mean loss of the whole batch.
        loss: what this process adds to the epoch's sum: `mean_loss` on rank 0, and 0 on the others,
            so that the sum does not depend on where an epoch was cut in two.
        counted: how many targets of the whole batch count.
        gradient_norm: a scalar, before clipping; 0 where gradients are scaled, since the scaler
            leaves out the steps of those that are not finite.
    """

    logits: Tensor
    mean_loss: Tensor
    loss: Tensor
    counted: Tensor
    gradient_norm: Tensor


class TrainStep:
    """Forward, backward and update on a batch.

    Args:
        state: what is trained.
        train: the configuration's TRAIN section.
        forward: `replica`, compiled or not.
        replica: `state.model`, or what the team trains of it.
        precision: of forward and backward.
        seed: makes mixup's draws a function of (seed, epoch, step).
        team: the processes that share each batch.
    """

    def __init__(
        self,
        state: TrainState,
        train: TrainConfig,
        forward: Forward,
        replica: nn.Module,
        precision: Precision,
        seed: int,
        team: Team,
    ) -> None:
        self._state = state
        self._train = train
        self._forward = forward
        self._replica = replica
        self._precision = precision
        self._seed = seed
        self._team = team

    def __call__(self, images: Tensor, targets: Tensor, epoch: int, step: int) -> StepResult:
        """Train on a batch.

        Args:
            images: (N, C, H, W), normalised; this process's of the batch.
            targets: (N,) int64.
            epoch: the epoch, counted from 1.
            step: the step in it, counted from 0.
        """
        alpha = self._train.mixup_alpha
        mixup, partners = None, targets
        if alpha:
            seed = (self._seed, epoch, step)
            mixup = Mixup.draw(alpha, len(images), seed, images.device, self._team.rank)
            images, partners = mixup.mix(images), mixup.partner_targets(targets)
        # The loss is the mean over the whole batch, whatever the sizes of its parts.
        count = (targets != self._train.ignore_label).sum()
        self._team.sum_(count)
        logits, losses = [], []
        parts = self._parts(images, targets, partners)
        for number, (image_part, target_part, partner_part) in enumerate(parts, start=1):
            last = number == len(parts)
            with nullcontext() if last else self._team.unsynchronised(self._replica):
                with self._precision.autocast():
                    output = self._forward(image_part)
                    loss = self._loss(output, target_part, partner_part, mixup, count)
                # A replica's gradients are the mean over the processes; their sum is wanted.
                self._state.scaler.scale(loss * self._team.size).backward()
            logits.append(output.detach())
            losses.append(loss.detach())
        norm = self._update()
        mean = torch.stack(losses).sum()
        self._team.sum_(mean)
        summed = mean if self._team.first else torch.zeros_like(mean)
        return StepResult(torch.cat(logits), mean, summed, count, norm)

    def _parts(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        chunks = [tensor.chunk(self._train.accumulate) for tensor in tensors]
        return list(zip(*chunks, strict=True))

    def _loss(
        self, logits: Tensor, targets: Tensor, partners: Tensor, mixup: Mixup | None, count: Tensor
    ) -> Tensor:
        smoothing, ignore = self._train.label_smoothing, self._train.ignore_label
        own = smoothed_cross_entropy(logits, targets, smoothing, ignore, count)
        if mixup is None:
            return own
        other = smoothed_cross_entropy(logits, partners, smoothing, ignore, count)
        return mixup.lam * own + (1 - mixup.lam) * other

    def _update(self) -> Tensor:
        """Change the weights; returns the norm of the gradient."""
        state = self._state
        if self._train.clip_grad:
            state.scaler.unscale_(state.optimizer)
        weights = [weight for weight in state.model.parameters() if weight.grad is not None]
        norm = nn.utils.get_total_norm(
            [weight.grad for weight in weights if weight.grad is not None]
        )
        if self._train.clip_grad:
            nn.utils.clip_grads_with_norm_(weights, self._train.clip_grad, norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        return torch.zeros_like(norm) if state.scaler.is_enabled() else norm


@torch.inference_mode()
def infer(
    forward: Forward, batches: Iterable[Batch], pipe: InputPipe, precision: Precision
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Run a network, in evaluation mode, over batches.

    Yields:
        Each batch, its logits (N, classes) in float32 and its targets (N,), on the device.
    """
    for batch in batches:
        images, targets = pipe(batch)
        with precision.autocast():
            logits = forward(images)
        yield batch, logits.float(), targets
