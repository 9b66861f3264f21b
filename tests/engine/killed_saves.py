"""Processes that save back to back, killed at random moments, and what they leave.

Called as `python killed_saves.py FOLDER KILLS SEED`; prints a line of JSON with the counts.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from sanctl.config.load import parse_config
from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.engine.claim import claimed
from sanctl.engine.runfolder import RunFolder
from sanctl.errors import SanctlError

_CONFIG = {"DATA": {"data_root": "x", "classes": 2}, "TRAIN": {"model": "resnet26"}}
_ELEMENTS = 50_000
_LATEST = 0.08  # s after the first save at which a process is killed


def kill_savers(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """What the folder is found in, by a process of its own."""
    program = [sys.executable, __file__, str(folder), str(kills), str(seed)]
    done = subprocess.run(
        program,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def _save_for_ever(root: Path, said: Connection) -> None:
    """What a run does to its folder, again and again, from where the one before stood."""
    folder = RunFolder(root)
    torch.set_num_threads(1)
    with claimed(root):
        folder.prepare(parse_config(_CONFIG, "x"), torch.device("cpu"))
        left = sum(path.name.startswith(".") for path in folder.model.iterdir())
        newest = folder.checkpoints()[-1:]
        number = int(re.findall(r"\d+", newest[0].name)[0]) if newest else 0
        said.send(("left", left))
        while True:
            number += 1
            checkpoint = Checkpoint({"a": torch.full((_ELEMENTS,), number)}, epoch=number)
            for kind, path in (("best", folder.best), ("newest", folder.checkpoint(number))):
                checkpoint.save(path)
                said.send((kind, number))
            folder.prune()


def _kill_one(
    folder: RunFolder, moment: float, saved: dict[str, int], counts: Counter[str]
) -> None:
    """Start a process and kill it; `saved` gets the last saves that it said were done."""
    context = multiprocessing.get_context("fork")
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=_save_for_ever, args=(folder.root, says))
    process.start()
    says.close()
    _, left = hears.recv()
    time.sleep(moment)
    process.kill()
    process.join()
    counts["not cleaned"] += left
    with hears, contextlib.suppress(EOFError):
        while True:
            kind, number = hears.recv()
            saved[kind] = number
            counts["saves"] += 1
    counts["cut off"] += any(path.name.startswith(".") for path in folder.model.iterdir())


def _look(folder: RunFolder, saved: dict[str, int], counts: Counter[str]) -> None:
    """Count what is missing of the saves that were done, and what there is that is not whole."""
    for path in folder.resumable():
        try:
            found = load_checkpoint(path)
        except SanctlError:
            counts["unloadable"] += 1
            continue
        right = torch.equal(found.state_dict["a"], torch.full((_ELEMENTS,), found.epoch))
        counts["wrong"] += not right or path not in (folder.best, folder.checkpoint(found.epoch))
        counts["wrong"] += path == folder.best and found.epoch < saved.get("best", 0)
    counts["missing"] += "best" in saved and not folder.best.exists()
    counts["missing"] += "newest" in saved and not folder.checkpoint(saved["newest"]).exists()


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    moments = random.Random(seed)
    counts: Counter[str] = Counter()
    saved: dict[str, int] = {}
    for _ in range(kills):
        _kill_one(RunFolder(folder), moments.uniform(0, _LATEST), saved, counts)
        _look(RunFolder(folder), saved, counts)
    names = ("saves", "cut off", "not cleaned", "missing", "unloadable", "wrong")
    sys.stdout.write(json.dumps({name: counts[name] for name in names}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
