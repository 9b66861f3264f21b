"""Real runs that a scheduler's signal reaches at a random moment, and what they leave."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tiny_run import Place, environment

from sanctl.engine.checkpoint import load_checkpoint
from sanctl.errors import UserError

EPOCHS = 12
KEYS = (f"TRAIN.epochs={EPOCHS}", "TRAIN.save_every_steps=1", "TRAIN.workers=1")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PATIENCE = 120  # s: what takes longer, hangs


class Ending(NamedTuple):
    """How a run ended, and what is wrong with that, if anything.

    `how` is "saved" where a checkpoint is left, "nothing saved" where the signal came before one,
    and "complete" where it came too late.
    """

    how: str
    problem: str


def seconds_of_a_whole_run(place: Place, exp: str, *options: str) -> float:
    """How long a run takes that no signal reaches."""
    started = time.monotonic()
    ending = signalled_run(place, exp, None, lambda: None, *options)
    assert ending == Ending("complete", ""), ending
    return time.monotonic() - started


def signalled_run(
    place: Place,
    exp: str,
    number: signal.Signals | None,
    wait: Callable[[], None],
    *options: str,
    to_all: bool = False,
) -> Ending:
    """Start a run, send it a signal, and look at what is left.

    Args:
        place: where it runs.
        exp: its folder.
        number: the signal.
        wait: returns when it is time to send it.
        options: of the command line.
        to_all: whether all processes of the run get the signal.
    """
    settings = [word for key in (*KEYS, f"TRAIN.save_path={exp}") for word in ("-o", key)]
    errors = place.folder / f"{exp}.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "sanctl", "train", "shapes", "tiny", "--device", "cpu",
             "--progress", "none", *settings, *options],
            cwd=place.folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )  # fmt: skip
    wait()
    if number is not None and process.poll() is None:
        (os.killpg if to_all else os.kill)(process.pid, number)
    try:
        status = process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return Ending("hangs", f"{number} after {options}")
    shell_status = 128 - status if status < 0 else status
    return _ending(place.folder / exp, shell_status, number, errors.read_text())


def _ending(run: Path, status: int, number: signal.Signals | None, errors: str) -> Ending:
    checkpoints = sorted((run / "model").glob("*.pth"))
    problem = _unloadable(checkpoints)
    if status == 0:
        rows = pd.read_csv(run / "metrics.csv").epoch.tolist()
        whole = rows == list(range(1, EPOCHS + 1)) and bool(checkpoints)
        return Ending("complete", problem or ("" if whole else f"status 0 after {rows}"))
    if number is None or status != 128 + number:
        problem = problem or f"status {status} after {number}: {errors}"
    if not checkpoints:
        # It may have died before it was there to say so.
        told = not errors or "nothing is saved" in errors
        return Ending("nothing saved", problem or ("" if told else errors))
    if found := re.search(r"; saved (\S+\.pth);", errors):
        named = run.parent / found[1]
        problem = problem or ("" if named.exists() else f"{named} is missing: {errors}")
    return Ending("saved", problem)


def _unloadable(checkpoints: list[Path]) -> str:
    for path in checkpoints:
        try:
            load_checkpoint(path)
        except UserError as error:
            return str(error)
    return ""


def at_random(draw: random.Random, longest: float) -> Callable[[], None]:
    """Something that waits for up to so many seconds."""
    return lambda: time.sleep(draw.uniform(0, longest))
