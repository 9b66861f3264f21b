"""Runs on a small file system that fills up: a tmpfs in a mount namespace of its own.

Called as `python small_disk.py WHAT DISK DATASET` within that; prints a line of JSON.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZE = 4 << 20
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def _mounted(folder: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", _MOUNT, "sh", str(SIZE), str(folder), *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def available(folder: Path) -> bool:
    """Whether this user may mount one."""
    return shutil.which("unshare") is not None and _mounted(folder, ["true"]).returncode == 0


def on_small_disk(what: str, folder: Path, dataset: Path) -> dict[str, Any]:
    """What a function of ACTS finds on a disk mounted on a folder, with a dataset of tiny_run."""
    done = _mounted(folder, [sys.executable, __file__, what, str(folder), str(dataset)])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes free; returns what takes the others."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - left))
    return filler


def save(disk: Path, dataset: Path) -> dict[str, Any]:
    """A disk that is too full for the next checkpoint, then is not any more."""
    from tiny_run import Place

    place = Place(disk, dataset)
    train = ("train", "shapes", "tiny", "--no-test", "-o", "TRAIN.workers=0")
    first, _, _ = place.main(*train, "-o", "TRAIN.epochs=1")
    before = {path: path.read_bytes() for path in place.model.iterdir()}
    filler = fill(disk, left=min(map(len, before.values())) // 2)
    failed, out, err = place.main(*train, "-o", "TRAIN.epochs=2", "--resume", "auto")
    intact = {path: path.read_bytes() for path in place.model.iterdir()} == before
    filler.unlink()
    again, _, _ = place.main(*train, "-o", "TRAIN.epochs=2", "--resume", "auto")
    return {
        "statuses": [first, failed, again],
        "notes": [line for line in out.splitlines() if line.startswith("note disk:")],
        "error": err,
        "intact": intact,
        "rows": (place.run / "metrics.csv").read_text().splitlines()[1:],
    }


def log(disk: Path, dataset: Path) -> dict[str, Any]:
    """A disk that is full from the second epoch to the last but one, while only logs are due."""
    from tiny_run import Place

    from sanctl.engine.checkpoint import load_checkpoint
    from sanctl.engine.fit import fit
    from sanctl.report.create import create_reporter
    from sanctl.report.records import EpochRecord
    from sanctl.report.reporter import CompositeReporter, Reporter

    epochs = 20  # as many as fill the page that a file may still have

    class Filling(Reporter):
        def epoch_finished(self, record: EpochRecord) -> None:
            if record.epoch == 2:
                fill(disk, left=0)
            if record.epoch == epochs - 1:
                (disk / "filler").unlink()

    place = Place(disk, dataset)
    settings = ["TRAIN.save_freq=100", "TRAIN.evaluate=false", f"TRAIN.epochs={epochs}"]
    run, said = place.open(*settings), io.StringIO()
    with contextlib.redirect_stdout(said):
        reporter = CompositeReporter([Filling(), create_reporter(place.run, 1)])
        fit(run, reporter)
        reporter.close()
    lines = said.getvalue().splitlines()
    return {
        "warnings": [line for line in lines if "cannot be written" in line],
        "trained": sum(line.startswith("epoch ") for line in lines),
        "epochs": epochs,
        "rows": len((place.run / "metrics.csv").read_text().splitlines()) - 1,
        "saved": load_checkpoint(place.model / f"train_epoch_{epochs}.pth").epoch,
        "log": (place.run / "train.log").read_text().splitlines()[-1],
    }


ACTS = {"save": save, "log": log}

if __name__ == "__main__":
    result = ACTS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.write(json.dumps(result) + "\n")
