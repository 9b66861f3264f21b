"""Fuzzing: a number of damaged files for one reader, in a process of its own.

Called as `python fuzzing.py READER INPUTS SEED`; prints a line of JSON with the counts.
"""

import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fuzz_inputs import READERS, Splice, damaged, damaged_inside, kept, outcome, splices
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SLOW = 10.0  # s for one file of some kB: what takes longer, hangs
_LARGE = 6 << 30


def fuzz(name: str, inputs: int, number: int) -> dict[str, float]:
    """Read damaged files; the first surprise is raised, with what caused it.

    Returns:
        How many files were "read" and "refused", and the "longest" time of one in s.
    """
    (reader,) = (each for each in READERS if each.name == name)
    counts: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        whole, folder = reader.whole(Path(first)), Path(second)

        @seed(number)
        @settings(
            max_examples=inputs,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.integers(0, 99), st.integers(0, 2), splices, kept)
        def read(which: int, inside: int, cuts: list[Splice], share: float) -> None:
            nonlocal longest
            data = whole[which % len(whole)]
            started = time.monotonic()
            bad = damaged_inside(data, which, cuts, share) if inside else damaged(data, cuts, share)
            counts[outcome(reader, bad, folder)] += 1
            longest = max(longest, time.monotonic() - started)
            assert longest < SLOW

        read()
    return {"read": 0, "refused": 0, **counts, "longest": longest}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_LARGE, _LARGE))
    result = fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(result) + "\n")
