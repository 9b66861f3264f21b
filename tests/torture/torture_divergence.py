"""Losses and gradients that are not finite in one process of two."""

import random
from collections.abc import Iterator
from pathlib import Path

from figures import Figure
from spoilt_run import diverge, listed
from team_run import run_team
from tiny_run import Place, write_dataset

from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.interrupt import StopRequest
from sanctl.engine.runfolder import RunFolder
from sanctl.engine.team import Team

Spoilt = tuple[str, tuple[int, int]]


def diverged_runs(folder: Path) -> Iterator[Figure]:
    """Spoil runs of two processes at random steps, in the second process alone."""
    place = Place(folder, write_dataset(folder / "images"))
    draw = random.Random(0)
    cases = [
        (what, (draw.randint(1, 3), draw.randint(1, 5)))
        for what in ("loss", "gradient")
        for _ in range(10)
    ]
    answers = run_team(2, _all, place.config, folder, cases)
    known = saved = found = 0
    for number, (_, (epoch, step)) in enumerate(cases):
        run = folder / f"{number}"
        words = {answer[number] for answer in answers}
        known += len(words) == 1 and f" at epoch {epoch}, step {step}," in words.pop()
        newest = [load_checkpoint(path) for path in RunFolder(run).resumable()]
        positions = [(each.epoch, each.step or 5) for each in newest]
        saved += any(position >= (epoch, step) for position in positions)
        lines = [(line[0], line[1]) for line in listed(run)]
        found += {line[2] for line in listed(run)} >= {"0"} and set(lines) == {
            (str(epoch), str(step))
        }
    count = len(cases)
    yield Figure(
        "not finite in one process of two: both stop at that step",
        f"{known} of {count} (10 losses, 10 gradients)",
        known == count,
    )
    yield Figure("nothing of it is saved", f"{saved} saved", not saved)
    yield Figure("the batch's images are listed", f"{found} of {count}", found == count)


def _all(
    team: Team, stop: StopRequest, config: Path, folder: Path, cases: list[Spoilt]
) -> list[str]:
    return [
        diverge(team, stop, config, folder / f"{number}", what, at)
        for number, (what, at) in enumerate(cases)
    ]
