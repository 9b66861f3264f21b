"""One training step and one pass over evaluation data."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from sanctl.config.schema import TrainConfig
from sanctl.data.loader import Batch
from sanctl.data.normalize import Normalizer
from sanctl.engine.device import Precision
from sanctl.engine.losses import Mixup, smoothed_cross_entropy
from sanctl.engine.state import TrainState

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


class TrainStep:
    """Forward, backward and update on a batch.

    Args:
        state: what is trained.
        train: the configuration's TRAIN section.
        forward: `state.model`, compiled or not.
        precision: of forward and backward.
        seed: makes mixup's draws a function of (seed, epoch, step).
    """

    def __init__(
        self,
        state: TrainState,
        train: TrainConfig,
        forward: Forward,
        precision: Precision,
        seed: int,
    ) -> None:
        self._state = state
        self._train = train
        self._forward = forward
        self._precision = precision
        self._seed = seed

    def __call__(
        self, images: Tensor, targets: Tensor, epoch: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Train on a batch.

        Args:
            images: (N, C, H, W), normalised.
            targets: (N,) int64.
            epoch: the epoch, counted from 1.
            step: the step in it, counted from 0.

        Returns:
            The logits (N, classes) and the mean loss, a scalar, both without a graph.
        """
        alpha = self._train.mixup_alpha
        mixup, partners = None, targets
        if alpha:
            mixup = Mixup.draw(alpha, len(images), (self._seed, epoch, step), images.device)
            images, partners = mixup.mix(images), mixup.partner_targets(targets)
        parts = self._train.accumulate
        # The loss is the mean over the whole batch, whatever the sizes of its parts.
        count = (targets != self._train.ignore_label).sum()
        logits, losses = [], []
        for image_part, target_part, partner_part in zip(
            images.chunk(parts), targets.chunk(parts), partners.chunk(parts), strict=True
        ):
            with self._precision.autocast():
                output = self._forward(image_part)
                loss = self._loss(output, target_part, partner_part, mixup, count)
            self._state.scaler.scale(loss).backward()
            logits.append(output.detach())
            losses.append(loss.detach())
        self._update()
        return torch.cat(logits), torch.stack(losses).sum()

    def _loss(
        self, logits: Tensor, targets: Tensor, partners: Tensor, mixup: Mixup | None, count: Tensor
    ) -> Tensor:
        smoothing, ignore = self._train.label_smoothing, self._train.ignore_label
        own = smoothed_cross_entropy(logits, targets, smoothing, ignore, count)
        if mixup is None:
            return own
        other = smoothed_cross_entropy(logits, partners, smoothing, ignore, count)
        return mixup.lam * own + (1 - mixup.lam) * other

    def _update(self) -> None:
        state = self._state
        if self._train.clip_grad:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), self._train.clip_grad)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update_parameters(state.model)


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
