"""The batches of a run, shared by its processes."""

from sanctl.config.schema import Config
from sanctl.data.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from sanctl.data.source import ImageSource
from sanctl.engine.team import Team


def open_train(config: Config, source: ImageSource, team: Team) -> TrainLoader:
    """The training batches, of which this process gets its share; the seed is settled."""
    train = config.TRAIN
    assert train.manual_seed is not None
    return train_loader(
        source,
        config.DATA,
        batch_size=train.batch_size,
        workers=_workers(config, team),
        seed=train.manual_seed,
        share=team.share,
        ignore_label=train.ignore_label,
    )


def open_val(config: Config, source: ImageSource | None, team: Team) -> EvalLoader | None:
    """The validation batches, of which this process gets its share; None without images."""
    if source is None:
        return None
    train = config.TRAIN
    return eval_loader(
        source,
        config.DATA,
        batch_size=train.batch_size_val,
        workers=_workers(config, team),
        share=team.share,
        ignore_label=train.ignore_label,
    )


def _workers(config: Config, team: Team) -> int:
    """How many of the machine's data workers are this process's: its part, rounded up."""
    return -(-config.TRAIN.workers // team.local_size)
