"""Losses and gradients that are not finite: who knows, what is saved, and how a run goes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from killed_run import outcome
from spoilt_run import diverge, listed, open_in, spoil_gradient, spoil_input
from team_run import run_team
from tiny_run import FilesOnly, Place

from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import StopRequest
from sanctl.engine.optim import learning_rate
from sanctl.engine.run import Run
from sanctl.engine.team import ALONE, Team
from sanctl.errors import SanctlError
from sanctl.report.records import EpochRecord
from sanctl.report.reporter import Reporter

ROLLBACK = ("TRAIN.on_divergence=rollback", "TRAIN.base_lr=0.01")


class Notes(FilesOnly):
    """Writes metrics.csv, and keeps the notes and the learning rates of the epochs."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.notes: list[str] = []
        self.note = self.notes.append


def test_the_images_of_a_diverged_batch_are_listed(place: Place) -> None:
    run = place.open("TRAIN.save_every_steps=1")
    spoilt = spoil_input(run, 2, 3)
    with pytest.raises(SanctlError) as caught:
        fit(run, FilesOnly(run))
    assert str(caught.value).startswith("the loss is nan at epoch 2, step 3, learning rate 0.0375:")
    assert str(place.run / "diverged_batch.txt") in str(caught.value)
    (names,) = spoilt
    assert len(names) == 4
    assert listed(place.run) == [["2", "3", "0", name] for name in names]
    assert [path.name for path in run.folder.checkpoints()] == [
        "train_epoch_2_step_1.pth", "train_epoch_2_step_2.pth"
    ]  # fmt: skip


def test_a_gradient_that_is_not_finite_is_seen_at_its_step(place: Place) -> None:
    run = place.open("TRAIN.save_every_steps=1")
    spoil_gradient(run, 1, 2)
    with pytest.raises(SanctlError, match=r"norm of the gradient is (inf|nan) at epoch 1, step 2,"):
        fit(run, FilesOnly(run))
    assert [path.name for path in run.folder.checkpoints()] == ["train_epoch_1_step_1.pth"]


def test_a_run_goes_back_and_on_with_a_lower_rate(place: Place) -> None:
    run = place.open(*ROLLBACK, "TRAIN.rollback_lr_factor=0.5")
    train = run.config.TRAIN
    spoilt = spoil_input(run, 3, 2, above=0.6 * learning_rate(train, 3))
    reporter = Notes(run)
    fit(run, reporter)
    (note,) = [note for note in reporter.notes if "back to" in note]
    assert "the loss is nan at epoch 3, step 2, learning rate 0.0025: back to " in note
    assert "train_epoch_2.pth, learning rate times 0.5, rollback 1 of 3; " in note
    assert listed(place.run) == [["3", "2", "0", name] for name in spoilt[0]]
    table = pd.read_csv(place.run / "metrics.csv")
    assert table.epoch.tolist() == [1, 2, 3]
    factors = [1, 1, 0.5]
    assert table.lr.tolist() == [
        learning_rate(train, epoch) * factor
        for epoch, factor in zip((1, 2, 3), factors, strict=True)
    ]
    assert load_checkpoint(place.model / "train_epoch_3.pth").rollbacks == 1


def test_a_run_that_diverges_at_once_goes_back_to_its_beginning(place: Place) -> None:
    run = place.open(*ROLLBACK, "TRAIN.epochs=1")
    spoil_input(run, 1, 1, above=0.005)
    fit(run, FilesOnly(run))
    lower = place.open("TRAIN.base_lr=0.001", "TRAIN.epochs=1", exp="lower")
    fit(lower, FilesOnly(lower))
    ours, expected = (outcome(place.folder / exp) for exp in ("exp/shapes/tiny", "lower"))
    weights = {key for key in ours if key.startswith("train_epoch_1.pth.state_dict")}
    assert weights
    assert all(ours[key] == expected[key] for key in weights)


def test_rollbacks_have_an_end(place: Place) -> None:
    run = place.open(*ROLLBACK, "TRAIN.rollbacks=2")
    spoilt = spoil_input(run, 2, 1)
    with pytest.raises(SanctlError, match=r"stopped after 2 rollbacks \(TRAIN\.rollbacks\)"):
        fit(run, FilesOnly(run))
    assert len(spoilt) == 3
    assert load_checkpoint(place.model / "train_epoch_1.pth").rollbacks == 2
    run = place.open(*ROLLBACK, "TRAIN.rollbacks=2", resume="auto")
    spoilt = spoil_input(run, 2, 1)
    with pytest.raises(SanctlError, match="stopped after 2 rollbacks"):
        fit(run, FilesOnly(run))
    assert len(spoilt) == 1


def test_rows_of_epochs_gone_back_over_are_written_once(place: Place) -> None:
    """The checkpoint is two epochs before the divergence."""
    run = place.open(*ROLLBACK, "TRAIN.epochs=4", "TRAIN.save_freq=3", "TRAIN.evaluate=false")
    spoil_input(run, 3, 2, above=0.002)
    fit(run, FilesOnly(run))
    table = pd.read_csv(place.run / "metrics.csv")
    assert table.epoch.tolist() == [1, 2, 3, 4]
    rates = [0.1 * learning_rate(run.config.TRAIN, epoch) for epoch in (1, 2, 3, 4)]
    assert table.lr.tolist() == pytest.approx(rates)


class Dies(FilesOnly):
    """Fails after an epoch is reported, before it is saved."""

    def __init__(self, run: Run, epoch: int) -> None:
        super().__init__(run)
        write: Callable[[EpochRecord], None] = vars(self)["epoch_finished"]

        def die(record: EpochRecord) -> None:
            write(record)
            if record.epoch == epoch:
                raise RuntimeError("killed")

        self.epoch_finished = die


def test_a_run_that_dies_after_going_back_goes_on_bit_for_bit(place: Place) -> None:
    keys = (*ROLLBACK, "TRAIN.save_every_steps=2", "TRAIN.epochs=3")

    def opened(exp: str, resume: str | None = None) -> Run:
        run = place.open(*keys, exp=exp, resume=resume)
        spoil_input(run, 2, 4, above=0.002)
        return run

    whole = opened("whole")
    fit(whole, FilesOnly(whole))
    assert whole.state.rollbacks == 1
    run = opened("died")
    with pytest.raises(RuntimeError, match="killed"):
        fit(run, Dies(run, 2))
    run = opened("died", resume="auto")
    assert (run.state.epoch, run.state.step, run.state.rollbacks) == (1, 4, 1)
    fit(run, FilesOnly(run))
    assert outcome(place.folder / "died") == outcome(place.folder / "whole")


def roll_back(team: Team, stop: StopRequest, config: Path, folder: Path) -> list[float]:
    run = open_in(team, config, folder / "back", *ROLLBACK)
    if team.rank == 1:
        spoil_input(run, 2, 2, above=0.005)
    fit(run, FilesOnly(run) if team.first else Reporter(), stop)
    return [run.state.rollbacks, run.state.lr, float(next(run.state.model.parameters()).sum())]


def do_all(team: Team, stop: StopRequest, config: Path, folder: Path) -> list[Any]:
    losses = diverge(team, stop, config, folder / "loss", "loss", (2, 2))
    gradients = diverge(team, stop, config, folder / "gradient", "gradient", (2, 2))
    return [losses, gradients, roll_back(team, stop, config, folder)]


def test_all_processes_know_at_the_same_step(place: Place) -> None:
    answers = run_team(2, do_all, place.config, place.folder)
    assert answers[0] == answers[1]
    loss, gradient, (rollbacks, rate, _) = answers[0]
    assert loss.startswith("the loss is nan at epoch 2, step 2, learning rate 0.0375: stopped")
    assert gradient.startswith("the norm of the gradient is ")
    assert " at epoch 2, step 2, " in gradient
    for what in ("loss", "gradient"):
        names = {path.name for path in (place.folder / what / "model").glob("train_*")}
        assert names == {"train_epoch_1.pth", "train_epoch_2_step_1.pth"}
        lines = listed(place.folder / what)
        assert [line[:3] for line in lines] == [["2", "2", rank] for rank in "0011"]
        assert len({line[3] for line in lines}) == 4
        assert all(Path(line[3]).exists() for line in lines)
    assert (rollbacks, rate) == (1, pytest.approx(0.1 * 0.0025))


def test_steps_that_the_gradient_scaler_leaves_out_are_no_divergence(place: Place) -> None:
    run = place.open("TRAIN.epochs=1")
    # float16 arithmetic is for GPUs; the scaler alone works here.
    run.state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    spoil_gradient(run, 1, 2)
    fit(run, FilesOnly(run))
    assert run.state.scaler.get_scale() < 65536.0
    assert run.team is ALONE
    assert len(run.folder.checkpoints()) == 1
