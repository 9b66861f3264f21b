"""A run put together from its configuration: data, network, state, and where it goes on."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sanctl.config.load import LoadedConfig
from sanctl.config.schema import Config
from sanctl.data.loader import EvalLoader, TrainLoader
from sanctl.data.normalize import Normalizer
from sanctl.data.source import ImageSource, open_source
from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.engine.device import Precision, choose_device, describe_device, place, prepare_backends
from sanctl.engine.loaders import open_train, open_val
from sanctl.engine.resume import Start, find_start, require_continuable
from sanctl.engine.room import describe_room
from sanctl.engine.runfolder import RunFolder
from sanctl.engine.skipped import needs_several_images
from sanctl.engine.state import TrainState, load_weights
from sanctl.engine.steps import Forward, InputPipe
from sanctl.engine.team import ALONE, Team
from sanctl.errors import UserError
from sanctl.report.lognotes import log_as_notes
from sanctl.report.records import RunInfo
from sanctl_models import build_model, compile_network, min_input_size

NETWORK_KEYS = (
    "model",
    "arch",
    "layers",
    "layer_types",
    "sa_type",
    "widths",
    "kernels",
    "added_nl_blocks",
)


@dataclass
class Run:
    """Everything that training needs.

    Attributes:
        config: resolved, with the seed that the run uses.
        dataset, name: what the user called them.
        folder: where the run writes.
        classes: class names by index.
        device, precision: what it computes on, and in which arithmetic.
        state: what training changes.
        team: the processes that train together.
        replica: what each process trains of it: the network itself where there is one process.
        trains, evaluates: replica and network, compiled or not.
        pipe: brings batches to the device.
        train, train_images: the training batches, and of how many images.
        image_name: what a training image is called, by its number.
        val, val_images: the same for validation; None and 0 where the run does not evaluate.
        notes: what the user should know before it starts.
    """

    config: Config
    dataset: str
    name: str
    folder: RunFolder
    classes: list[str]
    device: torch.device
    precision: Precision
    team: Team
    state: TrainState
    replica: nn.Module
    trains: Forward
    evaluates: Forward
    pipe: InputPipe
    train: TrainLoader
    train_images: int
    image_name: Callable[[int], str]
    val: EvalLoader | None
    val_images: int
    notes: list[str]

    @property
    def seed(self) -> int:
        """The seed of weights, order and augmentation."""
        assert self.config.TRAIN.manual_seed is not None
        return self.config.TRAIN.manual_seed

    def checkpoint(self, scores: dict[str, float]) -> Checkpoint:
        """The state with all that a test or a resumed run needs beside it."""
        checkpoint = self.state.checkpoint()
        checkpoint.scores = scores
        checkpoint.config = self.config.model_dump()
        checkpoint.classes = self.classes
        checkpoint.dataset, checkpoint.name = self.dataset, self.name
        return checkpoint

    def info(self) -> RunInfo:
        """What the reporters tell about the run."""
        train = self.config.TRAIN
        return RunInfo(
            dataset=self.dataset,
            name=self.name,
            network=train.model or str(train.arch),
            parameters=sum(p.numel() for p in self.state.model.parameters()),
            classes=len(self.classes),
            train_images=self.train_images,
            val_images=self.val_images,
            device=_describe(self.team, self.device),
            precision=str(self.precision),
            epochs=train.epochs,
            first_epoch=self.state.epoch + 1,
            steps_per_epoch=len(self.train),
            batch_size=train.batch_size,
            run_folder=self.folder.root,
        )


def open_run(
    loaded: LoadedConfig, *, device: str | None, resume: str | None, team: Team = ALONE
) -> Run:
    """Put a run together without writing anything.

    Args:
        loaded: the configuration, its dataset and name.
        device: cpu, cuda, cuda:N, or None to choose.
        resume: a checkpoint's path, "auto" for the newest of the run's folder, or None for what
            TRAIN.resume says.
        team: the processes that train together, each of which calls this.

    Raises:
        UserError: data, configuration, checkpoint or device do not fit.
    """
    notes = list(loaded.notes)
    folder = RunFolder(loaded.run_dir)
    start = find_start(folder, resume or loaded.config.TRAIN.resume, notes)
    team.require_same("the checkpoint to go on from", None if start is None else start.position)
    config = _with_seed(loaded.config, start, notes, team)
    target = choose_device(device, config.TRAIN.train_gpu)
    precision = Precision.choose(config.TRAIN.amp, target)
    if config.TRAIN.amp and precision.autocast_dtype is None:
        notes.append("TRAIN.amp has no effect on a CPU: training in float32")

    train_source = open_source(config.DATA, "train")
    val_source = open_source(config.DATA, "val") if config.TRAIN.evaluate else None
    _require_same_classes(train_source, val_source)
    train = open_train(config, train_source, team)
    if start is not None:
        require_continuable(start, config, train_source.classes, len(train))
    state = _open_state(config, target, precision, start, team)
    with log_as_notes(notes.append):
        _require_images_to_normalise(config, state.model, len(train_source), team)
    if state.epoch < config.TRAIN.epochs:
        notes.append(describe_room(folder, state.model, config.TRAIN))
    replica = team.replicate(state.model, target)
    val_images = 0 if val_source is None else len(val_source)
    trains: Forward = replica
    evaluates: Forward = state.model
    if config.TRAIN.compile:
        trained, evaluated = _full_batches(config, len(train_source), val_images, team)
        # Gradients must not add up, and sums of all processes are no part of a graph.
        graphs = config.TRAIN.accumulate == 1 and not (config.TRAIN.sync_bn and team.size > 1)
        trains = compile_network(replica, trained, cuda_graphs=graphs)
        evaluates = compile_network(state.model, evaluated, cuda_graphs=True)
    return Run(
        config=config,
        dataset=loaded.dataset,
        name=loaded.name,
        folder=folder,
        classes=train_source.classes,
        device=target,
        precision=precision,
        team=team,
        state=state,
        replica=replica,
        trains=trains,
        evaluates=evaluates,
        pipe=input_pipe(config, target),
        train=train,
        train_images=len(train_source),
        image_name=train_source.name,
        val=open_val(config, val_source, team),
        val_images=val_images,
        notes=notes,
    )


def build_network(config: Config) -> nn.Module:
    """Build the network of a configuration, on the CPU.

    Raises:
        UserError: its keys do not describe a network, or the images are too small for it.
    """
    keys = {key: getattr(config.TRAIN, key) for key in NETWORK_KEYS}
    try:
        model = build_model(
            **keys, classes=config.DATA.classes, grayscale=config.DATA.in_chans == 1
        )
    except ValueError as error:
        raise UserError(f"TRAIN: {error}") from None
    smallest = min_input_size(model)
    if config.DATA.image_size < smallest:
        raise UserError(
            f"DATA.image_size {config.DATA.image_size}: this network needs at least {smallest} px; "
            "raise it, or use smaller TRAIN.kernels"
        )
    return model


def input_pipe(config: Config, device: torch.device) -> InputPipe:
    """The way from batches to the network's input."""
    normalizer = Normalizer(config.DATA.mean, config.DATA.std)
    return InputPipe(normalizer, device, config.TRAIN.channels_last)


def _with_seed(config: Config, start: Start | None, notes: list[str], team: Team) -> Config:
    """Settle the seed: the configuration's, the interrupted run's, or a new one."""
    if config.TRAIN.manual_seed is not None:
        return config
    seed = None if start is None else start.setting("manual_seed")
    if seed is None:
        seed = team.first_says("seed", secrets.randbelow(2**31))
        notes.append(f"seed {seed} (to repeat the run: -o TRAIN.manual_seed={seed})")
    return config.model_copy(
        update={"TRAIN": config.TRAIN.model_copy(update={"manual_seed": seed})}
    )


def _open_state(
    config: Config, device: torch.device, precision: Precision, start: Start | None, team: Team
) -> TrainState:
    """The network and its optimiser: fresh, from initial weights, or from a checkpoint."""
    prepare_backends(config.TRAIN, device)
    model = build_network(config)
    if config.TRAIN.sync_bn and team.size > 1:
        if device.type != "cuda":
            raise UserError("TRAIN.sync_bn: only GPUs have it; leave it out on CPUs")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = place(model, device, config.TRAIN.channels_last)
    if start is None and config.TRAIN.weight:
        path = Path(config.TRAIN.weight)
        load_weights(model, load_checkpoint(path).weights(), path, head=config.TRAIN.weight_head)
    state = TrainState(model, config.TRAIN, precision)
    if start is not None:
        state.restore(start.checkpoint, start.path)
    return state


def _full_batches(
    config: Config, images: int, val_images: int, team: Team
) -> tuple[set[int], set[int]]:
    """Of how many images this process takes at once what it has of full batches."""
    train = config.TRAIN
    trained = team.share.of(np.arange(min(train.batch_size, images)))
    evaluated = team.share.of(np.arange(min(train.batch_size_val, val_images)))
    parts = torch.from_numpy(trained).chunk(train.accumulate)
    return {len(part) for part in parts}, {len(evaluated)}


def _require_images_to_normalise(config: Config, model: nn.Module, images: int, team: Team) -> None:
    """Refuse a step of one image where the last feature maps are single pixels.

    Batch normalisation has nothing to take a variance of there, and torch would say so at the end
    of the first epoch.
    """
    train = config.TRAIN
    sizes = {min(train.batch_size, images), images % train.batch_size} - {0}
    shares = (share for size in sizes for share in _shares(size, config, team) if len(share))
    parts = (part for share in shares for part in share.chunk(train.accumulate))
    if all(len(part) > 1 for part in parts):
        return
    side = config.DATA.image_size
    image = next(model.parameters()).new_zeros(1, config.DATA.in_chans, side, side)
    if needs_several_images(model, image):
        raise UserError(
            f"TRAIN.batch_size {train.batch_size}, TRAIN.accumulate {train.accumulate}"
            f"{f', {team.size} processes' if team.size > 1 else ''}: of "
            f"{images} training images one would be normalised alone, which needs feature maps "
            f"above 1 x 1 px (DATA.image_size {side}); choose another TRAIN.batch_size"
        )


def _shares(size: int, config: Config, team: Team) -> tuple[Tensor, ...]:
    """A batch as it is cut up into what is normalised together."""
    return torch.arange(size).tensor_split(1 if config.TRAIN.sync_bn else team.size)


def _describe(team: Team, device: torch.device) -> str:
    text = describe_device(device)
    return text if team.size == 1 else f"{team.size} processes, the first on {text}"


def _require_same_classes(train: ImageSource, val: ImageSource | None) -> None:
    if val is None or train.classes == val.classes:
        return
    different = sorted(set(train.classes) ^ set(val.classes)) or ["their order"]
    raise UserError(
        f"training and validation images have different classes: {', '.join(different[:5])}"
    )
