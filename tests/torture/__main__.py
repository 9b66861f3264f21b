"""`make torture`: measures what sanctl promises of its robustness, and prints the table.

`python tests/torture NAME...` measures some of it. To add a promise, write a function that yields
`Figure`s (see figures.py) and put it into MEASURES.
"""

import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "ops"), str(TESTS)]
sys.path[:0] = [str(TESTS / "hostile"), str(TESTS / "engine")]

from figures import Figure, Measure  # noqa: E402 - lies beside this file
from torture_divergence import diverged_runs  # noqa: E402
from torture_files import fuzzed_readers, hostile_files  # noqa: E402
from torture_images import bad_images  # noqa: E402
from torture_keeping import flipped_bits, full_disks, killed_saves, second_runs  # noqa: E402
from torture_runs import killed_runs, signalled_runs  # noqa: E402

from sanctl.report.console import clock, err  # noqa: E402
from sanctl.report.tables import print_table  # noqa: E402

MEASURES: dict[str, Measure] = {
    "images": bad_images,
    "files": hostile_files,
    "fuzz": fuzzed_readers,
    "saves": killed_saves,
    "bits": flipped_bits,
    "folders": second_runs,
    "disk": full_disks,
    "resumes": killed_runs,
    "signals": signalled_runs,
    "divergence": diverged_runs,
}


def main(names: list[str]) -> int:
    """Measure and print; return 1 where a promise does not hold."""
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        err.print(f"error: {unknown[0]}: unknown; use {', '.join(MEASURES)}")
        return 2
    figures: list[Figure] = []
    for name in names or MEASURES:
        started = time.monotonic()
        figures += measure(name)
        err.print(f"{name}: {clock(time.monotonic() - started)}")
    rows = [(figure.promise, figure.found, _word(figure)) for figure in figures]
    print_table(["promise", "found", "holds"], rows)
    return 0 if all(figure.holds for figure in figures) else 1


def measure(name: str) -> list[Figure]:
    """Run one of the measures in a folder that goes afterwards."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="sanctl-torture-") as folder:
        try:
            figures += MEASURES[name](Path(folder))
        except Exception as error:  # the other measures still count
            figures.append(Figure(name, f"{type(error).__name__}: {error}"[:300], False))
    return figures


def _word(figure: Figure) -> str:
    return "yes" if figure.holds else "NO"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
