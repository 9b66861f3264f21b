"""Where a run goes on from: which checkpoint, and whether going on from it makes sense."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sanctl.config.schema import Config
from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.engine.runfolder import RunFolder
from sanctl.errors import UserError


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from, and its file."""

    checkpoint: Checkpoint
    path: Path

    @property
    def position(self) -> list[int | None]:
        """The epoch and step of the checkpoint."""
        return [self.checkpoint.epoch, self.checkpoint.step]

    def setting(self, key: str) -> Any:
        """What TRAIN.`key` was in the run that wrote the checkpoint, or None if it does not say."""
        return ((self.checkpoint.config or {}).get("TRAIN") or {}).get(key)


def find_start(folder: RunFolder, resume: str | None, notes: list[str]) -> Start | None:
    """Find the checkpoint to go on from.

    Args:
        folder: the run's.
        resume: a path, "auto" for the newest checkpoint of the folder that is whole, or None.
        notes: gets what the user should know of it.

    Returns:
        The checkpoint, or None for a new run.

    Raises:
        UserError: a new run would write over an old one, or a checkpoint cannot be read.
    """
    if resume is None:
        folder.refuse_if_used()
        return None
    if resume != "auto":
        start = Start(load_checkpoint(Path(resume)), Path(resume))
        folder.refuse_if_ahead(start.path, start.checkpoint.epoch, start.checkpoint.step)
        return start
    return _newest_whole(folder, notes)


def _newest_whole(folder: RunFolder, notes: list[str]) -> Start | None:
    candidates = folder.resumable()
    for path in reversed(candidates):
        try:
            start = Start(load_checkpoint(path), path)
        except UserError as error:
            notes.append(str(error))
            continue
        if path != candidates[-1]:
            notes.append(f"{path}: going on from this one, the newest that can be read")
        return start
    if candidates:
        raise UserError(
            f"{folder.model}: none of its {len(candidates)} checkpoints can be read; "
            "move the folder away to start afresh"
        )
    notes.append(f"{folder.model}: no checkpoint yet, starting afresh")
    return None


def require_continuable(start: Start, config: Config, classes: list[str], steps: int) -> None:
    """Make sure that training can go on where the checkpoint stands.

    Args:
        start: the checkpoint.
        config: of the run that goes on, its seed settled.
        classes: class names of the data.
        steps: steps of an epoch.

    Raises:
        UserError: the classes are others; or the epoch under way would not go on with the images
            that it has not seen yet.
    """
    saved = start.checkpoint
    require_same_classes(saved, classes, start.path)
    if saved.step is None:
        return
    for key in ("manual_seed", "batch_size"):
        before, now = start.setting(key), getattr(config.TRAIN, key)
        if before is not None and before != now:
            raise UserError(
                f"{start.path}: saved in the middle of an epoch with TRAIN.{key} {before}, now it "
                f"is {now}; finish the epoch with the old value, or go on from a whole epoch"
            )
    if saved.step > steps:
        raise UserError(
            f"{start.path}: saved after step {saved.step} of an epoch, but an epoch has {steps} "
            "steps now; go on with the same training images"
        )


def require_same_classes(saved: Checkpoint, classes: list[str], path: Path) -> None:
    """Make sure that a checkpoint was trained on these classes, where it says on which.

    Raises:
        UserError: it was trained on others.
    """
    if saved.classes is None or saved.classes == classes:
        return
    if len(saved.classes) != len(classes):
        raise UserError(
            f"{path}: trained on {len(saved.classes)} classes, but the images have {len(classes)}"
        )
    pairs = zip(saved.classes, classes, strict=True)
    index, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UserError(
        f"{path}: trained on other classes than the images have: class {index} is {theirs!r} "
        f"in the checkpoint and {ours!r} in the data"
    )
