"""Runs that are interrupted and gone on with, and what they have to end like."""

import signal

from killed_run import flat
from tiny_run import FilesOnly, Place, ctrl_c_at

from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import InterruptedRunError

LAST = "train_epoch_3.pth"


def train(place: Place, *overrides: str, exp: str = "whole") -> None:
    run = place.open(*overrides, exp=exp)
    fit(run, FilesOnly(run))


def interrupt(
    place: Place, *overrides: str, at: tuple[int, int, bool], resume: str | None = None
) -> str:
    """Train until Ctrl-C is pressed at (epoch, step, whether in training); return the message."""
    run = place.open(*overrides, resume=resume)
    before = signal.getsignal(signal.SIGINT)
    message = None
    try:
        fit(run, FilesOnly(run, ctrl_c_at(*at)))
    except InterruptedRunError as error:  # no pytest.raises, which keeps the run's workers alive
        message = str(error)
    assert signal.getsignal(signal.SIGINT) is before
    assert message is not None
    return message


def go_on(place: Place, *overrides: str, resume: str = "auto") -> None:
    run = place.open(*overrides, resume=resume)
    fit(run, FilesOnly(run))


def assert_same_end(place: Place, whole: str = "whole") -> None:
    """The resumed run's files are those of the uninterrupted one, bit for bit."""
    expected_folder = place.folder / whole
    for name in (LAST, "model_best.pth"):
        ours = vars(load_checkpoint(place.model / name))
        expected = vars(load_checkpoint(expected_folder / "model" / name))
        for content in (ours, expected):
            content["config"]["TRAIN"].pop("save_path")
        assert flat(ours) == flat(expected)
    assert (place.run / "metrics.csv").read_text() == (expected_folder / "metrics.csv").read_text()
