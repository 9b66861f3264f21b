"""The folder of a run: where everything lies, and which checkpoint is the newest."""

import json
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torchvision

from sanctl import __version__
from sanctl.config.load import config_to_yaml
from sanctl.config.schema import Config
from sanctl.data.atomic import atomic_write, remove_leftovers
from sanctl.engine.device import operators_backend
from sanctl.errors import UserError
from sanctl_ops.backend import installed_cupy

_NAME = re.compile(r"train_epoch_(\d+)(?:_step_(\d+))?\.pth")
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class RunFolder:
    """`exp/DATASET/NAME` and the places in it."""

    root: Path

    @property
    def model(self) -> Path:
        """The folder of checkpoints."""
        return self.root / "model"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation top-1."""
        return self.model / "model_best.pth"

    @property
    def metrics(self) -> Path:
        """The scores of every epoch."""
        return self.root / "metrics.csv"

    @property
    def plots(self) -> Path:
        """The folder of curves."""
        return self.root / "plots"

    @property
    def test(self) -> Path:
        """The folder of test results."""
        return self.root / "test"

    def checkpoint(self, epoch: int, step: int | None = None) -> Path:
        """The file for the state after an epoch, or after some steps of one."""
        suffix = "" if step is None else f"_step_{step}"
        return self.model / f"train_epoch_{epoch}{suffix}.pth"

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints in training order, the newest last."""
        return [path for _, path in self._ordered()]

    def resumable(self) -> list[Path]:
        """What the run can go on from: its best checkpoint, then those of `checkpoints`."""
        return [*([self.best] if self.best.exists() else []), *self.checkpoints()]

    def _ordered(self) -> list[tuple[tuple[int, float], Path]]:
        found = []
        for path in self.model.glob("train_epoch_*.pth"):
            if match := _NAME.fullmatch(path.name):
                epoch, step = match.groups()
                found.append((_key(int(epoch), None if step is None else int(step)), path))
        return sorted(found)

    def prune(self) -> None:
        """Remove all but the newest checkpoints; the best has a file of its own."""
        for path in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            path.unlink(missing_ok=True)

    def refuse_if_used(self) -> None:
        """Make sure that a new run would not write over an old one.

        Raises:
            UserError: the folder holds checkpoints.
        """
        if found := self.resumable():
            raise UserError(
                f"{self.root}: holds a run already ({found[-1].name}); go on with --resume auto, "
                "or choose another folder with -o TRAIN.save_path=FOLDER"
            )

    def refuse_if_ahead(self, path: Path, epoch: int, step: int | None) -> None:
        """Make sure that going on from an older checkpoint does not mix with what came after it.

        Raises:
            UserError: the folder holds checkpoints of later epochs or steps.
        """
        later = [found for key, found in self._ordered() if key > _key(epoch, step)]
        if later:
            raise UserError(
                f"{self.root}: holds checkpoints later than {path} ({later[-1].name}); choose "
                "another folder with -o TRAIN.save_path=FOLDER, or move the later ones away"
            )

    def prepare(self, config: Config, device: torch.device) -> None:
        """Make the folder and write `config.yaml` (resolved) and `env.json`.

        What a killed run has left half written goes.

        Raises:
            UserError: the operators' backend that is asked for by name cannot run on the device.
        """
        self.model.mkdir(parents=True, exist_ok=True)
        for folder in (self.root, self.model):
            remove_leftovers(folder)
        with atomic_write(self.root / "config.yaml") as file:
            file.write(config_to_yaml(config).encode())
        with atomic_write(self.root / "env.json") as file:
            file.write(json.dumps(_environment(device), indent=2).encode() + b"\n")


def _key(epoch: int, step: int | None) -> tuple[int, float]:
    """What orders checkpoints: those in the middle of an epoch come before that of its end."""
    return epoch, float("inf") if step is None else step


def _environment(device: torch.device) -> dict[str, object]:
    backend = operators_backend(device)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "sanctl": __version__,
        "git": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "cupy": installed_cupy(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "device": str(device),
        "operators": {"backend": backend.name, "reason": backend.reason},
    }


def _git_commit() -> str | None:
    """The commit of the folder that the user works in, if it is a git checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
