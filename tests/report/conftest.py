"""A run to report on, of as many epochs as a test wants."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sanctl.report.records import EpochRecord, RunInfo, RunSummary, StepRecord
from sanctl.report.reporter import Reporter

EPOCHS, STEPS, VAL_STEPS = 12, 5, 2
Play = Callable[..., None]


def make_info(folder: Path, first_epoch: int = 1) -> RunInfo:
    return RunInfo(
        dataset="sketch_eitz",
        name="small san",
        network="san10_pairwise",
        parameters=10_512_345,
        classes=250,
        train_images=16_000,
        val_images=4_000,
        device="cpu",
        precision="float32",
        epochs=EPOCHS,
        first_epoch=first_epoch,
        steps_per_epoch=STEPS,
        batch_size=64,
        run_folder=folder,
    )


def make_epoch(epoch: int, validates: bool = True, shift: float = 0.0) -> EpochRecord:
    values: dict[str, float] = {"epoch": epoch, "lr": 0.1 / epoch}
    for part in ("train", "val") if validates else ("train",):
        values[f"loss_{part}"] = 1 / (3 * epoch) + shift
        values[f"top1_{part}"] = 70.0 + epoch
        values[f"top5_{part}"] = 80.0 + epoch
        for score in ("mIoU", "mAcc", "allAcc"):
            values[f"{score}_{part}"] = 0.7 + epoch / 100
    timing = {"seconds": 65.0, "images_per_s": 1234.5, "data_wait": 0.25}
    return EpochRecord(epoch, EPOCHS, values, best=epoch == 3, timing=timing)


def _play(
    reporter: Reporter,
    folder: Path,
    first: int = 1,
    last: int = EPOCHS,
    shift: float = 0.0,
    validates: bool = True,
    at_step: Callable[[int, int], None] = lambda epoch, step: None,
) -> None:
    """Tell a reporter of the epochs from first to last, as the engine does."""
    reporter.run_started(make_info(folder, first))
    for epoch in range(first, last + 1):
        reporter.epoch_started(epoch, STEPS, 0)
        for step in range(1, STEPS + 1):
            at_step(epoch, step)
            loss = 2.5 if step % 2 == 0 else None
            reporter.step(StepRecord(epoch, EPOCHS, step, STEPS, 321.0, 0.125, loss, 0.1))
        if validates:
            reporter.evaluation_started(VAL_STEPS)
            for step in range(1, VAL_STEPS + 1):
                reporter.evaluation_step(StepRecord(epoch, EPOCHS, step, VAL_STEPS, 999.0, 0.5))
        reporter.epoch_finished(make_epoch(epoch, validates, shift))
    if last == EPOCHS:
        reporter.run_finished(RunSummary(3, 73.0, 3725.0, folder))
    reporter.close()


@pytest.fixture
def play() -> Play:
    return _play


@pytest.fixture
def epoch_values() -> Callable[..., dict[str, float]]:
    """The values that `play` reports for an epoch."""

    def values(epoch: int, shift: float = 0.0) -> dict[str, float]:
        return dict(make_epoch(epoch, shift=shift).values)

    return values
