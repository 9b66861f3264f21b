"""Runs that are killed, that are told to stop, and that are done twice."""

import random
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from figures import Figure
from killing import WAYS, Killed, Way, killed_run, whole_run
from signalled import SIGNALS, Ending, at_random, seconds_of_a_whole_run, signalled_run
from tiny_run import Place, write_dataset

RUNS = 20  # killed, in each way
SIGNALLED = {(): 35, ("--nproc", "2"): 15}
AT_ONCE = 2


def killed_runs(folder: Path) -> Iterator[Figure]:
    """Kill runs and go on with them; do some twice without killing."""
    place = Place(folder, write_dataset(folder / "images"))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        results = list(threads.map(partial(_kill_some, place), WAYS))
    for way, (killed, same) in zip(WAYS, results, strict=True):
        exact = sum(not each.different for each in killed)
        different = sorted({name for each in killed for name in each.different})[:3]
        deaths = sum(each.deaths for each in killed)
        found = f"{exact} of {len(killed)} runs bit for bit, {deaths} kills {different or ''}"
        yield Figure(f"resume is exact: {way}", found, exact == len(killed) == RUNS)
        yield Figure(f"the same seed: {way}", "equal" if same else "different", same)


def _kill_some(place: Place, way: Way) -> tuple[list[Killed], bool]:
    name = f"{way.workers}_{way.processes}"
    draw = random.Random(name)
    expected = whole_run(place, way, f"whole_{name}")
    again = whole_run(place, way, f"again_{name}")
    killed = [killed_run(place, way, f"{name}_{i}", draw, expected) for i in range(RUNS)]
    return killed, expected == again


def signalled_runs(folder: Path) -> Iterator[Figure]:
    """Send signals at random moments, from the start of a process to its end."""
    place = Place(folder, write_dataset(folder / "images"))
    seconds = {options: seconds_of_a_whole_run(place, f"whole_{len(options)}", *options)
               for options in SIGNALLED}  # fmt: skip
    jobs = [options for options, count in SIGNALLED.items() for _ in range(count)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        endings = list(threads.map(partial(_signal, place, seconds), range(len(jobs)), jobs))
    counts = Counter(ending.how for ending in endings)
    problems = [ending.problem for ending in endings if ending.problem]
    found = ", ".join(f"{count} {how}" for how, count in counts.most_common())
    yield Figure(
        f"{len(endings)} signals at random moments: checkpoints load, statuses 143 and 138",
        f"{found}; {len(problems)} wrong {problems[:1] or ''}",
        not problems,
    )
    yield Figure("no run hangs", f"{counts['hangs']} hang", not counts["hangs"])


def _signal(
    place: Place, seconds: dict[tuple[str, ...], float], number: int, options: tuple[str, ...]
) -> Ending:
    draw = random.Random(number)
    sent: signal.Signals = draw.choice(SIGNALS)
    wait = at_random(draw, seconds[options])
    to_all = draw.random() < 0.5
    return signalled_run(place, f"run_{number}", sent, wait, *options, to_all=to_all)
