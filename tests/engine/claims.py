"""Processes that fight for a run folder.

Called as `python claims.py FOLDER TIMES`: starts until it has had the folder so often; prints how
often it was refused, and how often it was in it together with another.
"""

import os
import subprocess
import sys
from pathlib import Path

from sanctl.engine.claim import claimed
from sanctl.errors import UserError


def contend(root: Path, processes: int, times: int) -> tuple[int, int, int]:
    """How often processes had a folder, were refused, and were in it together."""
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(root), str(times)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    said = [process.communicate(timeout=300)[0].split() for process in running]
    refused, together = (sum(int(words[place]) for words in said) for place in (0, 1))
    return processes * times, refused, together


def main(root: Path, times: int) -> None:
    held = refused = together = 0
    while held < times:
        try:
            with claimed(root):
                held += 1
                together += not _alone(root / "inside")
        except UserError:
            refused += 1
    sys.stdout.write(f"{refused} {together}\n")


def _alone(inside: Path) -> bool:
    """Enter and leave a place where nobody else may be."""
    try:
        inside.mkdir()
    except FileExistsError:
        return False
    inside.rmdir()
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
