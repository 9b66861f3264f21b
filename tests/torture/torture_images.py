"""10,000 images of which 100 are bad: `sanctl dataset check`, training and evaluation."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bad_images import CLASSES, snapshot, write_images
from figures import Figure
from tiny_run import CONFIG

SIZES = {"train": (9_000, 90), "val": (1_000, 10)}
WORKERS = 2


def sanctl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sanctl", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def bad_images(folder: Path) -> Iterator[Figure]:
    """Measure what bad images do."""
    root = folder / "pictures"
    bad = {
        part: {str(path) for path in write_images(root / part, count, spoiled, seed=number)}
        for number, (part, (count, spoiled)) in enumerate(SIZES.items())
    }
    before = snapshot(root)
    yield _checked(folder, root, bad["train"] | bad["val"])
    yield from _trained(folder, root, bad)
    unchanged = snapshot(root) == before
    yield Figure("source files are never changed", f"{len(before):,} hashes equal", unchanged)


def _checked(folder: Path, root: Path, bad: set[str]) -> Figure:
    done = sanctl(folder, "dataset", "check", str(root), "--workers", str(WORKERS))
    named = set(re.findall(r"^damaged \(\w+\): (.+?): ", done.stdout, re.MULTILINE))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    found = f"{len(named & bad)} of {len(bad)} named, {len(named - bad)} others; {peak:,.0f} MiB"
    return Figure("check names exactly the bad ones", found, named == bad and done.returncode == 1)


def _trained(folder: Path, root: Path, bad: dict[str, set[str]]) -> Iterator[Figure]:
    config = folder / "config" / "shapes" / "shapes_tiny.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(CONFIG.format(root=root).replace("classes: 3", f"classes: {CLASSES}"))
    settings = ["DATA.bad_images=skip", "TRAIN.epochs=1", f"TRAIN.workers={WORKERS}"]
    settings += ["TRAIN.batch_size=32", "TRAIN.batch_size_val=32", "TRAIN.print_freq=1000"]
    options = [word for setting in settings for word in ("-o", setting)]
    done = sanctl(folder, "train", "shapes", "tiny", *options)
    lines = (folder / "exp/shapes/tiny/skipped_images.txt").read_text().splitlines()
    listed = {
        part: {line.split("\t")[1] for line in lines if line.startswith(part)} for part in bad
    }
    used = {part: _used(done.stdout, part) for part in bad}
    good = {part: count - spoiled for part, (count, spoiled) in SIZES.items()}
    yield Figure(
        "training leaves out and lists the bad ones",
        f"{used['train']:,} used, {len(listed['train'])} listed",
        done.returncode == 0 and listed == bad and used["train"] == good["train"],
    )
    tested = re.search(r"^images +(\d+)$", done.stdout, re.MULTILINE)
    evaluated = int(tested[1]) if tested else 0
    yield Figure(
        "evaluation reports how many it evaluated",
        f"{used['val']} and, in the test, {evaluated} of {SIZES['val'][0]:,}",
        used["val"] == evaluated == good["val"],
    )


def _used(out: str, part: str) -> int:
    found = re.search(rf"^note {part}: (\d+) images used", out, re.MULTILINE)
    return int(found[1]) if found else 0
