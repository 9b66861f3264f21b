"""A tiny dataset of drawings, and runs on it."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from sanctl.config.load import LoadedConfig, load_config
from sanctl.engine.run import Run, open_run
from sanctl.report.csvlog import CsvReporter
from sanctl.report.records import StepRecord
from sanctl.report.reporter import Reporter

CLASSES = ["circle", "cross", "square"]
IMAGES = {"train": 6, "val": 4, "test": 3}  # of each class
SIDE = 40

CONFIG = """\
DATA:
  data_root: {root}
  classes: 3
  grayscale: true
  image_size: 32
  resize: 36
TRAIN:
  arch: san
  sa_type: 0
  layers: [1, 1, 1]
  widths: [32, 64, 64]
  kernels: [3, 3, 3]
  workers: 0
  batch_size: 4
  batch_size_val: 5
  epochs: 3
  base_lr: 0.05
  label_smoothing: 0.1
  manual_seed: 7
  print_freq: 2
TEST:
  test_workers: 0
  batch_size_test: 5
"""


def draw(kind: str, generator: np.random.Generator) -> np.ndarray:
    """One drawing, (SIDE, SIDE) uint8."""
    image = np.full((SIDE, SIDE), 255, np.uint8)
    x, y = (int(v) for v in generator.integers(15, 25, 2))
    r = int(generator.integers(7, 13))
    if kind == "circle":
        cv2.circle(image, (x, y), r, 0, 2)
    elif kind == "square":
        cv2.rectangle(image, (x - r, y - r), (x + r, y + r), 0, 2)
    else:
        cv2.line(image, (x - r, y), (x + r, y), 0, 2)
        cv2.line(image, (x, y - r), (x, y + r), 0, 2)
    noise = generator.normal(0, 8, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def write_dataset(root: Path) -> Path:
    """Class folders of PNG files in train/, val/ and test/."""
    generator = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for kind in CLASSES:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                assert cv2.imwrite(str(folder / f"{number}.png"), draw(kind, generator))
    return root


class Place:
    """A folder of a user: config/shapes/shapes_tiny.yaml, and runs under exp/shapes/tiny."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.config = folder / "config" / "shapes" / "shapes_tiny.yaml"
        self.config.parent.mkdir(parents=True)
        self.config.write_text(CONFIG.format(root=root))

    @property
    def run(self) -> Path:
        return self.folder / "exp" / "shapes" / "tiny"

    @property
    def model(self) -> Path:
        return self.run / "model"

    def load(self, *overrides: str, exp: str = "exp/shapes/tiny") -> LoadedConfig:
        return load_config(self.config, [*overrides, f"TRAIN.save_path={self.folder / exp}"])

    def open(self, *overrides: str, resume: str | None = None, exp: str = "exp/shapes/tiny") -> Run:
        return open_run(self.load(*overrides, exp=exp), device="cpu", resume=resume)

    def main(self, *arguments: str) -> tuple[int, str, str]:
        """Run the command line in this process; return exit status, output and errors."""
        from sanctl.cli.main import main

        out, err, argv = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["sanctl", *arguments]
        try:
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                main()
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
        finally:
            sys.argv = argv

    def sanctl(
        self, *arguments: str, largest_file: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line in a process of its own.

        Args:
            arguments: what follows `sanctl`.
            largest_file: bytes after which writing to a file fails, as it does on a full disk.
        """
        limits = ""
        if largest_file is not None:
            limits = (
                "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
                f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file}, {largest_file})); "
            )
        program = f"{limits}from sanctl.cli.main import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::ResourceWarning"}


class FilesOnly(Reporter):
    """Writes metrics.csv, and calls back at steps."""

    def __init__(self, run: Run, on_step: Callable[[StepRecord, bool], None] | None = None) -> None:
        self._csv = CsvReporter(run.folder.metrics, self.note)
        self._on_step = on_step
        self.run_started = self._csv.run_started  # type: ignore[method-assign]
        self.epoch_finished = self._csv.epoch_finished  # type: ignore[method-assign]

    def step(self, record: StepRecord) -> None:
        if self._on_step is not None:
            self._on_step(record, True)

    def evaluation_step(self, record: StepRecord) -> None:
        if self._on_step is not None:
            self._on_step(record, False)


def ctrl_c_at(epoch: int, step: int, training: bool = True) -> Callable[[StepRecord, bool], None]:
    """Something that presses Ctrl-C at a step, by a real signal to this process."""

    def on_step(record: StepRecord, in_training: bool) -> None:
        if (record.epoch, record.step, in_training) == (epoch, step, training):
            signal.raise_signal(signal.SIGINT)

    return on_step
