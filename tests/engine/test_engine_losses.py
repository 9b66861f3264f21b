import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sanctl.engine.losses import Mixup, smoothed_cross_entropy

IGNORE = 2000
CPU = torch.device("cpu")


def oracle(logits: np.ndarray, targets: np.ndarray, eps: float) -> float:
    """1 - eps on the target and eps / (classes - 1) on each other class, image by image."""
    losses = []
    for row, target in zip(logits, targets, strict=True):
        if target == IGNORE:
            continue
        log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
        share = [1 - eps if k == target else eps / (len(row) - 1) for k in range(len(row))]
        losses.append(-float(np.dot(share, log_p)))
    return float(np.mean(losses)) if losses else 0.0


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 9),
    classes=st.integers(2, 12),
    eps=st.sampled_from([0.0, 0.1, 0.6, 0.95]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_smoothed_cross_entropy_is_the_explicit_formula(
    seed: int, n: int, classes: int, eps: float, ignored: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, classes))
    targets = np.where(rng.random(n) < ignored, IGNORE, rng.integers(0, classes, n))
    loss = smoothed_cross_entropy(torch.tensor(logits), torch.tensor(targets), eps, IGNORE)
    assert loss.dtype is torch.float64
    assert float(loss) == pytest.approx(oracle(logits, targets, eps), rel=1e-12, abs=1e-12)


def test_without_smoothing_it_is_torchs_cross_entropy() -> None:
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, -1, 0])
    ours = smoothed_cross_entropy(logits, targets, 0.0, -1)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, ignore_index=-1))


def test_smoothing_is_not_torchs() -> None:
    logits, targets = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3, 0])
    ours = smoothed_cross_entropy(logits, targets, 0.3, -1)
    theirs = F.cross_entropy(logits, targets, label_smoothing=0.3)
    assert abs(float(ours - theirs)) > 1e-3
    same = F.cross_entropy(logits, targets, label_smoothing=0.3 * 4 / 3)
    torch.testing.assert_close(ours, same)


def test_ignored_images_have_no_gradient_even_when_alone() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    smoothed_cross_entropy(logits, torch.tensor([-1, -1, -1]), 0.1, -1).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(64, 10).bfloat16()
    targets = torch.arange(64) % 10
    loss = smoothed_cross_entropy(logits, targets, 0.1, -1)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, smoothed_cross_entropy(logits.float(), targets, 0.1, -1))


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    logits, targets = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, -1, 2, -1, -1])
    whole = smoothed_cross_entropy(logits, targets, 0.1, -1)
    count = torch.tensor(2)
    parts = [
        smoothed_cross_entropy(logits[part], targets[part], 0.1, -1, count)
        for part in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_mixup_is_a_function_of_its_seed() -> None:
    first, again = (Mixup.draw(0.4, 16, (7, 2, 3), CPU) for _ in range(2))
    assert first.lam == again.lam
    assert torch.equal(first.partners, again.partners)
    for other in [(8, 2, 3), (7, 3, 3), (7, 2, 4), (7, 3, 2)]:
        assert Mixup.draw(0.4, 16, other, CPU).lam != first.lam


def test_mixup_draws_leave_the_global_generators_alone() -> None:
    torch.manual_seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    Mixup.draw(0.4, 16, (7, 2, 3), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # type: ignore[index]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_lam_is_beta_distributed(alpha: float) -> None:
    lams = np.array([Mixup.draw(alpha, 2, (0, 1, step), CPU).lam for step in range(4000)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert lams.mean() == pytest.approx(0.5, abs=0.03)
    assert lams.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_mixup_mixes_images_and_pairs_targets() -> None:
    mixup = Mixup.draw(1.0, 6, (0, 1, 0), CPU)
    assert sorted(mixup.partners.tolist()) == list(range(6))
    images, targets = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 3, 4, 5])
    original = images.clone()
    mixed = mixup.mix(images)
    assert torch.equal(images, original)
    for i, j in enumerate(mixup.partners.tolist()):
        torch.testing.assert_close(mixed[i], mixup.lam * images[i] + (1 - mixup.lam) * images[j])
        assert mixup.partner_targets(targets)[i] == targets[j]
