"""Hostile files, and damaged files in great numbers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from figures import Figure
from fuzz_inputs import READERS
from test_hostile_files import try_all

INPUTS = {"image": 7_000, "YAML config": 10_000}
OTHER_INPUTS = 17_000
PROCESSES = 2


def hostile_files(folder: Path) -> Iterator[Figure]:
    """Open every crafted file."""
    outcomes = try_all(folder)
    executed = sum(len(outcome.executions) for outcome in outcomes)
    read = sum(len(outcome.reads) for outcome in outcomes)
    clear = sum(outcome.harmless for outcome in outcomes)
    grown = max(outcome.grown for outcome in outcomes) / 2**20
    count = len(outcomes)
    yield Figure("hostile files execute nothing", f"{executed} by {count} files", not executed)
    yield Figure("they read nothing outside their folder", f"{read} by {count} files", not read)
    yield Figure(
        "each is refused in one clear line, memory bounded",
        f"{clear} of {count}; at most {grown:.0f} MiB more",
        clear == count >= 50,
    )


def fuzzed_readers(_: Path) -> Iterator[Figure]:
    """Read damaged files of every kind."""
    names = [reader.name for reader in READERS]
    with ThreadPoolExecutor(PROCESSES) as threads:
        results = dict(zip(names, threads.map(_fuzz, names), strict=True))
    total = 0
    for name, result in results.items():
        if isinstance(result, str):
            yield Figure(f"fuzzing: {name}", result, False)
            continue
        inputs = int(result["read"] + result["refused"])
        total += inputs
        found = f"{inputs:,} inputs: {result['read']:,} read, {result['refused']:,} refused"
        yield Figure(f"fuzzing: {name}", f"{found}; {result['longest']:.1f} s at most", True)
    yield Figure("fuzzing: all readers", f"{total:,} inputs, nothing else", total >= 100_000)


def _fuzz(name: str) -> dict[str, float] | str:
    """Return the counts of a process that reads damaged files, or its last words."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fuzzing.py")), name, _inputs(name), "0"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return f"status {done.returncode}: {done.stderr.strip()[-300:]}"
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _inputs(name: str) -> str:
    return str(INPUTS.get(name, OTHER_INPUTS))
