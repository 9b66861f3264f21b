"""How much room a run needs on the disk, and how much there is."""

import shutil

from torch import Tensor, nn

from sanctl.config.schema import TrainConfig
from sanctl.engine.runfolder import KEPT_CHECKPOINTS, RunFolder

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def describe_room(folder: RunFolder, model: nn.Module, train: TrainConfig) -> str:
    """Say what a run needs and what its file system has.

    The checkpoints are nearly all of it: the newest ones, the best, and the one being written.
    What lies in the folder already is taken into account. A quota is not known here, and what else
    is written to the disk is not either, so that this is a note and no reason to refuse.

    Args:
        folder: The run's; it need not exist.
        model: The network.
        train: The configuration of its training.
    """
    count = KEPT_CHECKPOINTS + train.evaluate + 1
    there = sum(path.stat().st_size for path in folder.resumable())
    needed = max(0, count * checkpoint_size(model, train) - there)
    place = next(path for path in (folder.root, *folder.root.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    text = f"disk: checkpoints will take up to {_size(needed)}, {_size(free)} are free in {place}"
    return text if needed < free else f"{text}: too little; free space, or choose another folder"


def checkpoint_size(model: nn.Module, train: TrainConfig) -> int:
    """The bytes of tensors in a checkpoint of training, once the optimiser has taken a step."""
    weights = sum(map(_bytes, model.state_dict().values()))
    parameters = sum(map(_bytes, model.parameters()))
    moments = 2 if train.optimizer == "adamw" else int(train.momentum > 0)
    averages = int(train.ema_decay > 0)
    return weights * (1 + averages) + parameters * moments


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(number: float) -> str:
    for unit in _UNITS[:-1]:
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} {_UNITS[-1]}"
