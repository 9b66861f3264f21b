"""Signals at every stage of a real run: loadable checkpoints or an honest word, and the status."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from signalled import EPOCHS, SIGNALS, Ending, at_random, signalled_run
from tiny_run import Place

from sanctl.cli.signals import told_what_is_saved


def appears(path: Path) -> Callable[[], None]:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.001)

    return wait


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_starting(place: Place, number: signal.Signals) -> None:
    draw = random.Random(int(number))
    ending = signalled_run(place, "started", number, at_random(draw, 2.0), to_all=True)
    assert ending.problem == ""


@pytest.mark.parametrize(
    ("number", "file"),
    [(signal.SIGTERM, "model/train_epoch_1_step_1.pth"), (signal.SIGUSR1, "metrics.csv")],
)
def test_a_signal_in_training(place: Place, number: signal.Signals, file: str) -> None:
    run = place.folder / "run"
    ending = signalled_run(place, "run", number, appears(run / file))
    assert ending == Ending("saved", "")
    assert "; saved " in (place.folder / "run.txt").read_text()


def test_a_signal_after_training(place: Place) -> None:
    """While the best checkpoint is tested, or just before, or when all is done."""
    last = place.folder / "run" / "model" / f"train_epoch_{EPOCHS}.pth"
    ending = signalled_run(place, "run", signal.SIGTERM, appears(last))
    assert ending.problem == ""
    assert ending.how in ("saved", "complete")


def test_two_processes_and_a_signal_while_starting(place: Place) -> None:
    draw = random.Random(1)
    options = ("--nproc", "2")
    wait = at_random(draw, 6.0)
    ending = signalled_run(place, "run", signal.SIGTERM, wait, *options, to_all=True)
    assert ending.problem == ""


def test_handlers_are_those_of_before(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with told_what_is_saved(tmp_path):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
