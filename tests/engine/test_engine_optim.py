import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sanctl.config.schema import TrainConfig
from sanctl.engine.optim import build_ema, build_optimizer, learning_rate


def train_config(**keys: Any) -> TrainConfig:
    return TrainConfig(model="resnet26", **keys)


def rates(scheduler: LRScheduler, epochs: int) -> list[float]:
    """The learning rate of each epoch, with one scheduler step an epoch as in the original."""
    found = []
    for _ in range(epochs):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def optimizer(lr: float) -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def ours(train: TrainConfig) -> list[float]:
    return [learning_rate(train, epoch) for epoch in range(1, train.epochs + 1)]


@given(
    epochs=st.integers(1, 40),
    milestones=st.sets(st.integers(1, 45), max_size=4),
    lr=st.floats(1e-4, 10),
)
def test_step_is_torchs_multi_step(epochs: int, milestones: set[int], lr: float) -> None:
    train = train_config(
        scheduler="step", base_lr=lr, epochs=epochs, step_epochs=sorted(milestones)
    )
    expected = rates(MultiStepLR(optimizer(lr), sorted(milestones), gamma=0.1), epochs)
    assert ours(train) == pytest.approx(expected, rel=1e-9)


@given(epochs=st.integers(1, 60), lr=st.floats(1e-4, 10))
def test_cosine_is_torchs_cosine_annealing(epochs: int, lr: float) -> None:
    train = train_config(scheduler="cosine", base_lr=lr, epochs=epochs)
    expected = rates(CosineAnnealingLR(optimizer(lr), T_max=epochs), epochs)
    assert ours(train) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@given(warmup=st.integers(1, 10), rest=st.integers(1, 30), lr=st.floats(1e-4, 10))
def test_warm_up_rises_linearly_and_the_cosine_spans_the_rest(
    warmup: int, rest: int, lr: float
) -> None:
    epochs = warmup + rest
    train = train_config(base_lr=lr, epochs=epochs, warmup_epochs=warmup)
    base = optimizer(lr)
    rise = LinearLR(base, start_factor=1 / (warmup + 1), total_iters=warmup)
    fall = CosineAnnealingLR(base, T_max=rest)
    expected = rates(SequentialLR(base, [rise, fall], milestones=[warmup]), epochs)
    assert ours(train) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_milestones_count_from_the_first_epoch_with_a_warm_up_too() -> None:
    train = train_config(
        scheduler="step", base_lr=1.0, epochs=6, step_epochs=[3, 5], warmup_epochs=2
    )
    assert ours(train) == pytest.approx([1 / 3, 2 / 3, 1, 0.1, 0.1, 0.01])


def test_sgd_has_the_configured_momentum_and_decay_on_every_parameter() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    made = build_optimizer(model, train_config(base_lr=0.3, momentum=0.8, weight_decay=0.01))
    assert type(made) is SGD
    (group,) = made.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.01)
    assert not group["nesterov"]
    assert len(group["params"]) == len(list(model.parameters()))


def test_adamw_takes_momentum_for_its_first_beta() -> None:
    train = train_config(optimizer="adamw", base_lr=1e-3, momentum=0.85, weight_decay=0.05)
    made = build_optimizer(nn.Linear(2, 2), train)
    assert type(made) is AdamW
    (group,) = made.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.85, 0.999), 0.05)


def test_no_ema_without_a_decay() -> None:
    assert build_ema(nn.Linear(2, 2), 0.0) is None


def test_ema_is_the_recurrence_over_weights_and_buffers() -> None:
    torch.manual_seed(0)
    decay = 0.9
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    ema = build_ema(model, decay)
    assert ema is not None
    expected: dict[str, torch.Tensor] = {}
    made = SGD(model.parameters(), lr=0.1)
    for step in range(5):
        model(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
        made.step()
        made.zero_grad()
        ema.update_parameters(model)
        now = copy.deepcopy(model.state_dict())
        expected = {
            key: value if step == 0 else decay * expected[key] + (1 - decay) * value
            for key, value in now.items()
            if value.is_floating_point()
        }
    averaged = ema.module.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(averaged[key], value)
    assert not torch.equal(averaged["0.weight"], model.state_dict()["0.weight"])


def test_ema_is_torchs_averaged_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ours = build_ema(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    assert ours is not None
    made = SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        model(torch.randn(4, 3)).square().sum().backward()
        made.step()
        ours.update_parameters(model)
        theirs.update_parameters(model)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, value in ours.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key])
    assert not any(value.requires_grad for value in ours.parameters())
