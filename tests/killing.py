"""Runs killed at random moments and gone on with, beside one that nothing interrupts."""

import random
from typing import NamedTuple

from killed_run import EVERYTHING, STEPS, Death, Task, outcome, run_to_its_end
from team_run import free_port
from tiny_run import Place


class Way(NamedTuple):
    """How runs compute: data workers and processes."""

    workers: int
    processes: int

    def __str__(self) -> str:
        with_processes = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.workers} workers{with_processes}"


WAYS = (Way(0, 1), Way(2, 1), Way(4, 1), Way(0, 2))


class Killed(NamedTuple):
    """A run that was killed: how often, and which of its values are not those of the whole run."""

    deaths: int
    different: list[str]


def whole_run(place: Place, way: Way, exp: str) -> dict[str, object]:
    """What a run leaves that nothing interrupts."""
    assert run_to_its_end(_task(place, way, exp, None)) == 0
    return outcome(place.folder / exp)


def killed_run(
    place: Place, way: Way, exp: str, draw: random.Random, expected: dict[str, object]
) -> Killed:
    """Kill a run at a random moment, and its continuation sometimes too; then let it end."""
    deaths = 0
    most = STEPS
    while most > 1:
        death = Death(draw.randint(1, most), draw.choice([0, draw.uniform(0, 0.05)]))
        if run_to_its_end(_task(place, way, exp, death)) == 0:
            break  # the moment came after its end
        deaths += 1
        most = draw.choice([0, STEPS // 3])
    else:
        assert run_to_its_end(_task(place, way, exp, None)) == 0
    found = outcome(place.folder / exp)
    # Where the last kill came between saving and pruning, there is one checkpoint more.
    return Killed(deaths, sorted(key for key in expected if found.get(key) != expected[key]))


def _task(place: Place, way: Way, exp: str, death: Death | None) -> Task:
    keys = (*EVERYTHING, f"TRAIN.workers={way.workers}", f"TRAIN.save_path={place.folder / exp}")
    return Task(place.config, keys, way.processes, free_port(), death)
