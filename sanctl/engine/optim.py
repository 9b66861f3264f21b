"""Optimiser, learning-rate schedule and weight average, as the configuration asks."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sanctl.config.schema import TrainConfig


def build_optimizer(model: nn.Module, train: TrainConfig) -> Optimizer:
    """SGD with momentum, or AdamW, with weight decay on every parameter as the original had."""
    if train.optimizer == "adamw":
        return AdamW(
            model.parameters(),
            lr=train.base_lr,
            betas=(train.momentum, 0.999),
            weight_decay=train.weight_decay,
        )
    return SGD(
        model.parameters(),
        lr=train.base_lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
    )


def learning_rate(train: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch, which is a function of the epoch alone.

    `step` is torch's MultiStepLR (0.1 at each of step_epochs); `cosine` its CosineAnnealingLR over
    the epochs, both stepped once an epoch as in the original. A warm-up of W epochs rises linearly
    from base_lr / (W + 1), and the cosine then spans the epochs that remain. Nothing of this needs
    a place in a checkpoint, so a resumed run may change it.

    Args:
        train: scheduler, base_lr, epochs, step_epochs and warmup_epochs.
        epoch: counted from 1.
    """
    done = epoch - 1
    if done < train.warmup_epochs:
        return train.base_lr * epoch / (train.warmup_epochs + 1)
    if train.scheduler == "step":
        return train.base_lr * 0.1 ** sum(done >= milestone for milestone in train.step_epochs)
    progress = (done - train.warmup_epochs) / max(train.epochs - train.warmup_epochs, 1)
    return train.base_lr * 0.5 * (1 + math.cos(math.pi * progress))


class WeightAverage(nn.Module):
    """An exponential moving average of a network's weights and buffers, beside the network.

    It starts at the weights after the first update: avg = decay * avg + (1 - decay) * weights.
    torch's AveragedModel computes the same (the tests compare the two), but makes the host wait for
    the GPU at every step.

    Args:
        model: the network, on its device.
        decay: share of the average that stays at each step, in (0, 1).

    Attributes:
        module: the averaged network.
        n_averaged: how many updates it has seen, on the CPU.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device="cpu"))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the network's weights, after a step, into the average."""
        averages, values = [], []
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if self.n_averaged == 0 or not average.is_floating_point():
                average.copy_(value)
            else:
                averages.append(average)
                values.append(value)
        if averages:
            self._average(averages, values, self.n_averaged)
        self.n_averaged += 1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def build_ema(model: nn.Module, decay: float) -> WeightAverage | None:
    """The moving average of a network, or None where decay is 0."""
    return WeightAverage(model, decay) if decay else None
