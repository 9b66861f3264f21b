"""Runs killed at any moment that go on: what comes out is what an uninterrupted run gives."""

import random

import pandas as pd
import pytest
from killing import Way, killed_run, whole_run
from tiny_run import FilesOnly, Place

from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.fit import fit


@pytest.mark.parametrize("way", [Way(0, 1), Way(2, 1), Way(0, 2)], ids=str)
def test_a_run_killed_at_random_goes_on_bit_for_bit(place: Place, way: Way) -> None:
    expected = whole_run(place, way, "whole")
    killed = killed_run(place, way, "killed", random.Random(str(way)), expected)
    assert killed.deaths
    assert killed.different == []


@pytest.mark.parametrize("way", [Way(2, 1), Way(0, 2)], ids=str)
def test_the_same_seed_gives_the_same_metrics_file(place: Place, way: Way) -> None:
    first, second = (whole_run(place, way, exp) for exp in ("first", "second"))
    assert first["metrics.csv"] == second["metrics.csv"]


def test_checkpoints_within_epochs_come_at_the_steps_asked_for(place: Place) -> None:
    run = place.open("TRAIN.save_every_steps=2", "TRAIN.epochs=2")
    seen: list[set[str]] = []

    def look(*_: object) -> None:
        names = {path.name for path in place.model.glob("train_*")}
        if names and names not in seen:
            seen.append(names)

    fit(run, FilesOnly(run, look))
    look()
    files = ["1_step_2", "1_step_4", "1", "2_step_2", "2_step_4", "2"]
    expected = [files[:1], *(files[i : i + 2] for i in range(5))]
    assert seen == [{f"train_epoch_{name}.pth" for name in names} for names in expected]
    saved = load_checkpoint(place.model / "train_epoch_2_step_4.pth")
    assert (saved.epoch, saved.step) == (2, 4)
    assert pd.read_csv(place.run / "metrics.csv").epoch.tolist() == [1, 2]


def test_saving_within_epochs_changes_no_score(place: Place) -> None:
    for exp, every in (("never", 0), ("often", 1)):
        run = place.open(f"TRAIN.save_every_steps={every}", exp=exp)
        fit(run, FilesOnly(run))
    never, often = (place.folder / exp / "metrics.csv" for exp in ("never", "often"))
    assert never.read_bytes() == often.read_bytes()
