import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sanctl.config.schema import TrainConfig
from sanctl.data.loader import Batch
from sanctl.data.normalize import Normalizer
from sanctl.engine.device import Precision
from sanctl.engine.losses import Mixup
from sanctl.engine.state import TrainState
from sanctl.engine.steps import InputPipe, TrainStep, infer
from sanctl.engine.team import ALONE
from sanctl_models import build_model

CLASSES = 5
SEED = 3


def plain_net() -> nn.Module:
    """A network without batch normalisation, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, CLASSES)
    ).double()


def batch(n: int = 7, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, CLASSES, (n,), generator=generator)


def make(model: nn.Module, **keys: Any) -> tuple[TrainStep, TrainState]:
    train = TrainConfig(model="resnet26", **keys)
    precision = Precision("cpu")
    state = TrainState(model, train, precision)
    state.begin_epoch(train)
    return TrainStep(state, train, model, model, precision, SEED, ALONE), state


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_a_plain_training_loop(optimizer: str) -> None:
    torch.manual_seed(0)
    model = build_model(
        arch="san", layers=[1, 1], widths=[32, 32], kernels=[3, 3], sa_type=1, classes=CLASSES,
        grayscale=True,
    ).double()  # fmt: skip
    reference = copy.deepcopy(model)
    step, _ = make(model, optimizer=optimizer, base_lr=0.05, momentum=0.9, weight_decay=1e-3)
    plain: torch.optim.Optimizer
    if optimizer == "sgd":
        plain = torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    else:
        plain = torch.optim.AdamW(
            reference.parameters(), 0.05, betas=(0.9, 0.999), weight_decay=1e-3
        )
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(4, 1, 16, 16, dtype=torch.float64, generator=generator)
        targets = torch.randint(0, CLASSES, (4,), generator=generator)
        logits, loss, *_ = step(images, targets, 1, number)
        expected = reference(images)
        expected_loss = F.cross_entropy(expected, targets)
        plain.zero_grad()
        expected_loss.backward()
        plain.step()
        torch.testing.assert_close(logits, expected.detach())
        torch.testing.assert_close(loss, expected_loss.detach())
        assert not logits.requires_grad
        assert not loss.requires_grad
    torch.testing.assert_close(weights(model), weights(reference))


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
@pytest.mark.parametrize("keys", [{}, {"mixup_alpha": 0.5, "label_smoothing": 0.1}])
def test_accumulated_parts_are_the_whole_batch(parts: int, keys: dict[str, float]) -> None:
    images, targets = batch()
    targets[4] = targets[5] = targets[6] = -1  # left out: some parts then count fewer, or none
    model = plain_net()
    other = copy.deepcopy(model)
    whole, _ = make(model, base_lr=0.1, **keys)
    in_parts, _ = make(other, base_lr=0.1, accumulate=parts, **keys)
    for number in range(2):
        logits, loss, *_ = whole(images, targets, 1, number)
        logits_of_parts, loss_of_parts, *_ = in_parts(images, targets, 1, number)
        torch.testing.assert_close(logits, logits_of_parts)
        torch.testing.assert_close(loss, loss_of_parts)
    torch.testing.assert_close(weights(model), weights(other))


def test_a_batch_of_ignored_images_is_no_reason_to_stop() -> None:
    model = plain_net()
    step, _ = make(model, weight_decay=0.0)
    before = weights(model)
    images, targets = batch()
    _, loss, *_ = step(images, torch.full_like(targets, -1), 1, 0)
    assert float(loss) == 0
    assert torch.equal(weights(model), before)


def test_clip_grad_limits_the_norm_of_the_gradient() -> None:
    images, targets = batch()
    lr, limit = 0.5, 0.01
    model = plain_net()
    step, _ = make(model, base_lr=lr, clip_grad=limit, weight_decay=0.0)
    before = weights(model)
    step(images, targets, 1, 0)
    assert float((weights(model) - before).norm()) == pytest.approx(lr * limit, rel=1e-5)


def test_short_gradients_are_not_clipped() -> None:
    images, targets = batch()
    model = plain_net()
    other = copy.deepcopy(model)
    make(model, clip_grad=1e6)[0](images, targets, 1, 0)
    make(other)[0](images, targets, 1, 0)
    assert torch.equal(weights(model), weights(other))


def test_mixup_trains_on_mixed_images_and_both_targets() -> None:
    images, targets = batch()
    model = plain_net()
    reference = copy.deepcopy(model)
    step, _ = make(model, mixup_alpha=0.7, label_smoothing=0.2, base_lr=0.1, weight_decay=0.0)
    _, loss, *_ = step(images, targets, 4, 9)
    drawn = Mixup.draw(0.7, len(images), (SEED, 4, 9), torch.device("cpu"))
    mixed = drawn.lam * images + (1 - drawn.lam) * images[drawn.partners]
    wanted = torch.full((len(images), CLASSES), 0.2 / (CLASSES - 1), dtype=torch.float64)
    own = wanted.scatter(1, targets[:, None], 0.8)
    both = drawn.lam * own + (1 - drawn.lam) * own[drawn.partners]
    expected = -(both * reference(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected.detach())
    plain = torch.optim.SGD(reference.parameters(), 0.1)
    expected.backward()
    plain.step()
    torch.testing.assert_close(weights(model), weights(reference))


def test_the_average_follows_every_step() -> None:
    model = plain_net()
    step, state = make(model, ema_decay=0.75, base_lr=0.2)
    assert state.ema is not None
    images, targets = batch()
    step(images, targets, 1, 0)
    first = weights(model)
    step(images, targets, 1, 1)
    expected = 0.75 * first + 0.25 * weights(model)
    torch.testing.assert_close(weights(state.ema.module), expected)


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2, 3])
    found = []
    for channels_last in (False, True):
        torch.manual_seed(5)
        model = build_model(model="resnet26", classes=CLASSES).double()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        pipe = InputPipe(Normalizer([0.5], [0.25]), torch.device("cpu"), channels_last)
        step, _ = make(model, base_lr=0.1, channels_last=channels_last)
        inputs, goals = pipe(Batch(images, targets, torch.arange(4)))
        assert inputs.is_contiguous(memory_format=torch.channels_last) == channels_last
        logits, *_ = step(inputs.double(), goals, 1, 0)
        found.append((logits, weights(model)))
    torch.testing.assert_close(found[0], found[1])


def test_the_pipe_normalises_by_channel() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    pipe = InputPipe(Normalizer(mean, std), torch.device("cpu"), channels_last=False)
    inputs, targets = pipe(Batch(images, torch.tensor([3, 4]), torch.arange(2)))
    expected = (images.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert targets.tolist() == [3, 4]


def test_infer_yields_each_batch_with_its_logits() -> None:
    model = plain_net().float().eval()
    pipe = InputPipe(Normalizer([0.5], [0.25]), torch.device("cpu"), channels_last=False)
    batches = [
        Batch(
            torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8),
            torch.zeros(n, dtype=torch.int64),
            torch.arange(n),
        )
        for n in (3, 2)
    ]
    results = list(infer(model, batches, pipe, Precision("cpu")))
    assert [result[0] for result in results] == batches
    for given, logits, _ in results:
        torch.testing.assert_close(logits, model(pipe(given)[0]).detach())
        assert logits.dtype is torch.float32
        assert not logits.requires_grad
