"""Checkpoint files: written whole or not at all, read without running anybody's code."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sanctl.data.atomic import atomic_write
from sanctl.errors import UserError

FORMAT = 1

# Checkpoints of the original carry their scores as numpy scalars: harmless data, which torch's
# restricted unpickler has to be told of. numpy 1 called the module `numpy.core`, numpy 2
# `numpy._core`.
_scalar: Any = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "?")),
]

# How torch's restricted unpickler names what it refuses to build.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


@dataclass
class Checkpoint:
    """What a checkpoint file holds; all but the weights may be missing in the original's files.

    Attributes:
        state_dict: the network's weights and buffers.
        epoch: the epoch that these weights come from, counted from 1.
        step: how many steps of that epoch they have seen, or None when the epoch is complete.
        optimizer, scaler, ema: the state_dicts of the training state. The learning rate is a
            function of the epoch and needs none.
        rng: states of torch's generators, "cpu" and "cuda".
        metrics: sums of the epoch under way, when `step` is given.
        scores: the scores of the epoch, named as the columns of metrics.csv.
        best_epoch, best_score: the best epoch so far, and its validation top-1 in percent.
        config: the resolved configuration, as sections of keys.
        classes: class names by index.
        dataset, name: what the run is called.
    """

    state_dict: dict[str, Tensor]
    epoch: int = 0
    step: int | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    rng: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    best_score: float = -1.0
    config: dict[str, Any] | None = None
    classes: list[str] | None = None
    dataset: str | None = None
    name: str | None = None

    def save(self, path: Path) -> None:
        """Write to a temporary file beside `path`, flush it and rename it into place.

        Raises:
            SanctlError: the file cannot be written; what stood at `path` before is intact.
        """
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, **vars(self)}, file)

    def weights(self) -> dict[str, Tensor]:
        """The weights to test with: the moving average where the run kept one."""
        if self.ema is None:
            return self.state_dict
        prefix = "module."
        return {
            key.removeprefix(prefix): value
            for key, value in self.ema.items()
            if key.startswith(prefix)
        }


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ours, one published in the original's format, or bare weights.

    Raises:
        UserError: the file is missing, cut short, no checkpoint, or holds objects other than
            tensors and plain values, which are refused without being built.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint (it holds a {type(content).__name__})")
    if "state_dict" not in content:
        content = {"state_dict": content}
    weights = content["state_dict"]
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{path}: not a checkpoint (it holds no weights)")
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: not a checkpoint (its state_dict holds more than tensors)")
    if "format" not in content:
        return _foreign(content)
    if content["format"] != FORMAT:
        raise UserError(
            f"{path}: its format {content['format']} is not one this sanctl reads; upgrade sanctl"
        )
    known = {key: content[key] for key in Checkpoint.__dataclass_fields__ if key in content}
    return Checkpoint(**known)


def _foreign(content: dict[str, Any]) -> Checkpoint:
    """What a file of another program surely means: whatever else it holds may mean anything."""
    epoch, optimizer = content.get("epoch"), content.get("optimizer")
    return Checkpoint(
        state_dict=content["state_dict"],
        epoch=int(epoch) if isinstance(epoch, int | np.integer) else 0,
        optimizer=optimizer if isinstance(optimizer, dict) else None,
    )


def _read(path: Path) -> Any:
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a checkpoint; name the .pth file in it")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it will refuse right afterwards
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # torch reports damage as RuntimeError, EOFError, KeyError, UnpicklingError, ..., over many
        # lines which advise to load the file with its code running: not to be passed on.
        if refused := _REFUSED.search(str(error)):
            raise UserError(
                f"{path}: refused, since it holds {refused[1]}; "
                "a checkpoint holds tensors and plain values alone"
            ) from error
        raise UserError(f"{path}: cut short, damaged or not a checkpoint") from error
