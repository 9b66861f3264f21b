"""Runs in which something is not finite at a step that the test chooses."""

import math
from pathlib import Path
from typing import Any

from tiny_run import FilesOnly
from torch import Tensor

from sanctl.config.load import load_config
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import StopRequest
from sanctl.engine.run import Run, open_run
from sanctl.engine.team import Team
from sanctl.errors import SanctlError
from sanctl.report.reporter import Reporter


def spoil_input(run: Run, epoch: int, step: int, above: float = 0.0) -> list[list[str]]:
    """Make the images of a step NaN while the rate is above a limit; what they are called."""
    pipe, spoilt = run.pipe, list[list[str]]()

    def spoiling(batch: Any) -> tuple[Tensor, Tensor]:
        images, targets = pipe(batch)
        state = run.state
        here = state.model.training and (state.epoch + 1, state.step + 1) == (epoch, step)
        if here and state.lr > above:
            spoilt.append([run.image_name(number) for number in batch.indices.tolist()])
            images = images * math.nan
        return images, targets

    run.pipe = spoiling  # type: ignore[assignment]
    return spoilt


def spoil_gradient(run: Run, epoch: int, step: int) -> None:
    """Make one weight's gradient infinite at a step, whose loss is finite."""
    weight = next(run.state.model.parameters())

    def spoil(gradient: Tensor) -> Tensor:
        here = (run.state.epoch + 1, run.state.step + 1) == (epoch, step)
        return gradient * math.inf if here else gradient

    weight.register_hook(spoil)


def open_in(team: Team, config: Path, exp: Path, *keys: str) -> Run:
    loaded = load_config(config, [*keys, f"TRAIN.save_path={exp}"])
    return open_run(loaded, device="cpu", resume=None, team=team)


def diverge(
    team: Team, stop: StopRequest, config: Path, exp: Path, what: str, at: tuple[int, int]
) -> str:
    """Train while the last rank alone spoils the "loss" or the "gradient" at an epoch and step.

    Returns:
        What this process says of it.
    """
    run = open_in(team, config, exp, "TRAIN.save_every_steps=1")
    if team.rank == team.size - 1:
        (spoil_input if what == "loss" else spoil_gradient)(run, *at)
    try:
        fit(run, FilesOnly(run) if team.first else Reporter(), stop)
    except SanctlError as error:
        return str(error)
    return "not diverged"


def listed(folder: Path) -> list[list[str]]:
    """The lines of a run's diverged_batch.txt."""
    lines = (folder / "diverged_batch.txt").read_text().splitlines()
    return [line.split("\t") for line in lines]
