"""Checkpoint files: written whole or not at all, read without running anybody's code."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from sanctl.data.atomic import atomic_write
from sanctl.data.seal import ChecksumError, require_whole, save_sealed
from sanctl.data.torch_file import DamagedFileError, RefusedFileError, load_torch_file
from sanctl.errors import UserError, shown

FORMAT = 1
_MOST_EPOCHS = 10**9


def _scalar(kind: Any, data: Any) -> Any:
    """Build a numpy scalar out of its bytes, without the sizes and kinds that numpy would take."""
    if not isinstance(kind, np.dtype) or kind.kind not in "fiub" or type(data) is not bytes:
        raise ValueError("no number")
    return np.frombuffer(data, kind, count=1)[0]


def _dtype(name: Any, *_: Any) -> np.dtype:
    if name not in ("f8", "f4", "f2", "i8", "i4", "b1"):
        raise ValueError("no dtype of a score")
    return np.dtype(name)


# Checkpoints of the original carry their scores as numpy scalars: harmless data, which torch's
# restricted unpickler has to be told of. numpy 1 called the module `numpy.core`, numpy 2
# `numpy._core`.
_NUMPY_SCALARS: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_dtype, "numpy.dtype"),
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "?")),
]


_Number = Annotated[int, Field(ge=0, le=_MOST_EPOCHS)]


@dataclass
class Checkpoint:
    """What a checkpoint file holds; all but the weights may be missing in the original's files.

    Attributes:
        state_dict: the network's weights and buffers.
        epoch: the epoch that these weights come from, counted from 1.
        step: how many steps of that epoch they have seen, or None when the epoch is complete.
        optimizer, scaler, ema: the state_dicts of the training state. The learning rate is a
            function of the epoch and of `rollbacks`, and needs none.
        rng: states of torch's generators, "cpu" and "cuda".
        metrics: sums of the epoch under way, when `step` is given.
        scores: the scores of the epoch, named as the columns of metrics.csv.
        best_epoch, best_score: the best epoch so far, and its validation top-1 in percent.
        rollbacks: how often the run went back to a checkpoint, to a lower learning rate.
        config: the resolved configuration, as sections of keys.
        classes: class names by index.
        dataset, name: what the run is called.
    """

    state_dict: dict[str, Tensor]
    epoch: _Number = 0
    step: _Number | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    rng: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    best_epoch: _Number = 0
    best_score: float = -1.0
    rollbacks: _Number = 0
    config: dict[str, Any] | None = None
    classes: list[str] | None = None
    dataset: str | None = None
    name: str | None = None

    def save(self, path: Path) -> None:
        """Write to a temporary file beside `path`, flush it and rename it into place.

        The file ends with a checksum of its content.

        Raises:
            SanctlError: the file cannot be written; what stood at `path` before is intact.
        """
        with atomic_write(path) as file:
            save_sealed({"format": FORMAT, **vars(self)}, file)

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


_CHECKS = ConfigDict(strict=True, arbitrary_types_allowed=True)
_FIELDS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(kind, config=_CHECKS)
    for name, kind in get_type_hints(Checkpoint, include_extras=True).items()
}


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ours, one published in the original's format, or bare weights.

    Raises:
        UserError: the file is missing, cut short, no checkpoint, does not match its checksum, or
            holds objects other than tensors and plain values, which are refused without being
            built.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint (it holds a {type(content).__name__})")
    if "state_dict" not in content:
        content = {"state_dict": content}
    weights = content["state_dict"]
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{path}: not a checkpoint (it holds no weights)")
    if not all(type(key) is str and isinstance(value, Tensor) for key, value in weights.items()):
        raise UserError(f"{path}: not a checkpoint (its state_dict holds more than tensors)")
    if "format" not in content:
        return _foreign(content)
    number = content["format"]
    if type(number) is not int or number != FORMAT:
        raise UserError(
            f"{path}: its format {shown(number)} is not one this sanctl reads; upgrade sanctl"
        )
    known = {key: content[key] for key in Checkpoint.__dataclass_fields__ if key in content}
    for key, value in known.items():
        try:
            _FIELDS[key].validate_python(value)
        except ValidationError:
            raise UserError(
                f"{path}: damaged or not a checkpoint (its {key} is {shown(value)})"
            ) from None
    return Checkpoint(**known)


def _foreign(content: dict[str, Any]) -> Checkpoint:
    """What a file of another program surely means: whatever else it holds may mean anything."""
    epoch, optimizer = content.get("epoch"), content.get("optimizer")
    return Checkpoint(
        state_dict=content["state_dict"],
        epoch=_counted(epoch),
        optimizer=optimizer if isinstance(optimizer, dict) else None,
    )


def _counted(epoch: Any) -> int:
    is_number = isinstance(epoch, int | np.integer) and 0 <= epoch <= _MOST_EPOCHS
    return int(epoch) if is_number else 0


def _read(path: Path) -> Any:
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a checkpoint; name the .pth file in it")
    try:
        require_whole(path)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return load_torch_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ChecksumError as error:
        raise UserError(
            f"{path}: damaged since it was written: its checksum does not match; use another "
            "checkpoint"
        ) from error
    except DamagedFileError as error:
        raise UserError(f"{path}: cut short, damaged or not a checkpoint") from error
    except RefusedFileError as refusal:
        raise UserError(
            f"{path}: refused: {refusal}; a checkpoint holds tensors and plain values alone"
        ) from refusal
