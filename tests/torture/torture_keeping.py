"""What is on the disk, whatever happens: kills, flipped bits, second runs, full disks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from claims import contend
from figures import Figure
from killed_saves import kill_savers
from small_disk import available, on_small_disk
from tiny_run import write_dataset

from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.errors import UserError

KILLS = 200
PROCESSES = 2


def killed_saves(folder: Path) -> Iterator[Figure]:
    """Kill processes that save back to back."""
    share = KILLS // PROCESSES
    folders = [folder / str(number) for number in range(PROCESSES)]
    with ThreadPoolExecutor(PROCESSES) as threads:
        results = list(threads.map(kill_savers, folders, [share] * PROCESSES, range(PROCESSES)))
    total = {name: sum(counts[name] for counts in results) for name in results[0]}
    yield Figure(
        "runs killed while saving: the newest and the best are there and whole",
        f"{total['missing']} missing, {total['unloadable']} unloadable, {total['wrong']} wrong "
        f"after {KILLS} kills, {total['cut off']} of them in the middle of a save",
        not total["missing"] + total["unloadable"] + total["wrong"] and total["cut off"] > 0,
    )
    yield Figure(
        "the next start clears their temporary files away, and has the folder",
        f"{total['not cleaned']} left of {total['cut off']}",
        not total["not cleaned"],
    )


def flipped_bits(folder: Path) -> Iterator[Figure]:
    """Flip every bit of a checkpoint, one at a time."""
    path = folder / "x.pth"
    Checkpoint({"a": torch.arange(250.0)}, epoch=3, classes=["ant", "bee"]).save(path)
    content = bytearray(path.read_bytes())
    noticed = 0
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        noticed += _is_refused(path)
        content[bit // 8] ^= 1 << bit % 8
    yield Figure(
        "a flipped bit anywhere in a checkpoint is noticed",
        f"{noticed:,} of {8 * len(content):,} bits",
        noticed == 8 * len(content),
    )


def _is_refused(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except UserError as error:
        return "damaged" in str(error)
    return False


def second_runs(folder: Path) -> Iterator[Figure]:
    """Let processes fight for a run folder."""
    held, refused, together = contend(folder / "run", processes=4, times=250)
    yield Figure(
        "of runs in one folder at once all but one are refused",
        f"{together} times two in {held:,} starts, {refused:,} refused",
        not together and held == 1000 and refused > 0,
    )


def full_disks(folder: Path) -> Iterator[Figure]:
    """Train on a disk that fills up."""
    disk, dataset = folder / "disk", write_dataset(folder / "shapes")
    disk.mkdir()
    if not available(disk):
        yield Figure("full disks", "not measured: no tmpfs may be mounted here", False)
        return
    found = on_small_disk("save", disk, dataset)
    yield Figure(
        "a full disk while saving: the checkpoints before are whole, the run goes on later",
        f"{'byte for byte' if found['intact'] else 'DAMAGED'}, statuses {found['statuses']}",
        found["intact"] and found["statuses"] == [0, 1, 0] and str(disk) in found["error"],
    )
    found = on_small_disk("log", disk, dataset)
    yield Figure(
        "a full disk while logging: one warning each, training goes on, nothing is missing after",
        f"{len(found['warnings'])} warnings, {found['trained']} epochs, {found['rows']} rows",
        len(found["warnings"]) == 3 and found["trained"] == found["rows"] == found["epochs"],
    )
