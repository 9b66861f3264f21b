"""The configuration's sections and keys: the one place that says what each key means.

The sections and keys are those of the published SAN configuration files, extended. Every field
carries the text that `sanctl config new` writes above it and `sanctl config show` prints.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sanctl.config.fields import (
    MOST_CLASSES,
    Blocks,
    Count,
    Fraction,
    Gpus,
    Index,
    Kernels,
    Number,
    PerChannel,
    Pixels,
    Section,
    Text,
    Widths,
    Workers,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRAY_MEAN, GRAY_STD = (0.1307,), (0.3081,)


class DataConfig(Section):
    """The images: where they lie, how they are stored, and what the network sees of them."""

    data_root: Text = Field(description="Folder of the dataset.")
    dataset_init: Literal["image_folder", "preprocessed_paths", "byte_imgs", "txt_mappings"] = (
        Field(
            default="image_folder",
            description="How the images are stored: image_folder reads the class folders in train/,"
            " val/ and test/; preprocessed_paths reads train_init.pt and val_init.pt (written by"
            " `sanctl dataset index` and `split`); byte_imgs reads train_imgs.pt and val_imgs.pt"
            " (written by `sanctl dataset pack`, the fastest); txt_mappings reads train.txt,"
            " val.txt and mapping.txt.",
        )
    )
    data_name: Text | None = Field(
        default=None, description="Name of the dataset, for titles and for the run's folder."
    )
    classes: int = Field(
        ge=2, le=MOST_CLASSES, description="Number of classes; must be that of the data."
    )
    grayscale: bool = Field(
        default=False,
        description="true: images are read with one channel; false: with three (RGB).",
    )
    channels: Literal[1, 3] | None = Field(
        default=None, description="The same as a number of channels; empty: as grayscale says."
    )
    split: Literal[0, 1, 2] | None = Field(
        default=None,
        description="Not used any more; old files chose here how folders were split at run time.",
        json_schema_extra={
            "note": "has no effect: the parts are read as they lie on disk; `sanctl dataset index`"
            " and `sanctl dataset split` make them"
        },
    )
    split_ratio: Number | list[Number] | None = Field(
        default=None,
        description="Not used any more; `sanctl dataset split --ratio` takes its place.",
        json_schema_extra={"note": "has no effect: use `sanctl dataset split --ratio`"},
    )
    mean: PerChannel = Field(
        default=list(IMAGENET_MEAN),
        description="Mean of each channel, pixels scaled to 0..1, subtracted from the input; one"
        " value serves every channel. Empty: 0.485, 0.456, 0.406 for RGB, 0.1307 for grayscale"
        " (`sanctl dataset stats` measures yours).",
        json_schema_extra={"follows": "DATA.grayscale"},
    )
    std: PerChannel = Field(
        default=list(IMAGENET_STD),
        description="Standard deviation of each channel, by which the input is divided. Empty:"
        " 0.229, 0.224, 0.225 for RGB, 0.3081 for grayscale.",
        json_schema_extra={"follows": "DATA.grayscale"},
    )
    image_size: Pixels = Field(
        default=224, description="Side of the square that the network sees, in pixels."
    )
    resize: Pixels = Field(
        default=256,
        description="Short side to which images are resized for evaluation, in pixels, before the"
        " centre of image_size is cut out. Empty: image_size * 8 / 7, which is 256 for 224.",
        json_schema_extra={"follows": "DATA.image_size"},
    )
    bad_images: Literal["error", "skip"] = Field(
        default="error",
        description="What an image that cannot be read does: error ends the run and names it; skip"
        " leaves it out, with nothing in its place, and lists it in skipped_images.txt.",
    )
    allow_outside: bool = Field(
        default=False,
        description="true: index and text files may name images outside data_root; false: such"
        " paths are refused, since a file from elsewhere may name any file of yours.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend(cls, values: Any) -> Any:
        """Fill grayscale, mean, std and resize from the keys they follow when they are not set."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if "grayscale" not in values and values.get("channels") == 1:
            values["grayscale"] = True
        if values.get("grayscale") is True:
            values.setdefault("mean", list(GRAY_MEAN))
            values.setdefault("std", list(GRAY_STD))
        size = values.get("image_size")
        if isinstance(size, int):
            values.setdefault("resize", max(1, round(size * 8 / 7)))
        return values

    @property
    def in_chans(self) -> int:
        """Number of input channels: 1 for grayscale, else 3."""
        return 1 if self.grayscale else 3


class TrainConfig(Section):
    """The network and its training."""

    model: Text | None = Field(
        default=None,
        description="Name of a network in the registry (`sanctl config list`), from which the keys"
        " arch to added_nl_blocks come unless they are given here. Empty: they are all given here.",
    )
    arch: Literal["san", "resnet", "nl", "hybrid"] | None = Field(
        default=None,
        description="Family of the network: san (local self-attention), resnet, nl (non-local"
        " blocks), hybrid (a block type per stage). Empty: hybrid where layer_types is given.",
    )
    layers: Blocks | None = Field(default=None, description="Number of blocks of each stage.")
    layer_types: list[Literal["res", "san", "nl"]] | None = Field(
        default=None,
        description="hybrid: block type of each stage; the first stage cannot be nl.",
    )
    sa_type: Literal[0, 1] | None = Field(
        default=None,
        description="Self-attention of san stages: 0 pairwise, 1 patchwise.",
    )
    widths: Widths | None = Field(
        default=None,
        description="hybrid and san: channels of each stage. Empty, for san: the published 64, 256,"
        " 512, 1024, 2048.",
    )
    kernels: Kernels | None = Field(
        default=None,
        description="san: side of the attention window of each stage, in pixels, odd. Empty: the"
        " published 3, 7, 7, 7, 7.",
    )
    added_nl_blocks: list[Index] | None = Field(
        default=None,
        description="hybrid: non-local blocks added to each stage, at most as many as the stage"
        " has blocks. Empty: none.",
    )
    ignore_label: int = Field(
        default=-1,
        description="Label that losses and scores leave out; no index of a class. -1: none.",
    )
    train_gpu: Gpus = Field(
        default=[0],
        description="Indices of the GPUs to train on, one process each; where there is no GPU, the"
        " CPU trains.",
    )
    workers: Workers = Field(
        default=4,
        description="Processes that read and decode images, on each machine, shared by its GPUs;"
        " 0: in the main process.",
    )
    batch_size: Count = Field(
        default=64,
        description="Images per training step, over all processes together.",
    )
    batch_size_val: Count = Field(
        default=64, description="Images per evaluation step, over all processes together."
    )
    base_lr: Annotated[Number, Field(gt=0)] = Field(
        default=0.1, description="Learning rate from which the schedule starts."
    )
    epochs: Count = Field(default=100, description="Number of passes over the training images.")
    start_epoch: Index = Field(
        default=0, description="Epoch to start from, counted from 0; resume sets it by itself."
    )
    step_epochs: list[Count] = Field(
        default=[30, 60, 90],
        description="scheduler step: epochs after which the learning rate is divided by 10.",
    )
    label_smoothing: Fraction = Field(
        default=0.0,
        description="Share of the target's weight that goes to the other classes, 0 <= x < 1;"
        " 0: off.",
    )
    mixup_alpha: Annotated[Number, Field(ge=0)] = Field(
        default=0.0,
        description="Mixup: both parameters of the Beta distribution that the mixing weight is"
        " drawn from; empty or 0: off.",
    )
    scheduler: Literal["step", "cosine"] = Field(
        default="cosine",
        description="Learning rate over the epochs: step (see step_epochs) or cosine (to 0).",
    )
    warmup_epochs: Index = Field(
        default=0, description="Epochs over which the learning rate rises to base_lr; 0: off."
    )
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="Optimizer.")
    momentum: Fraction = Field(
        default=0.9, description="Momentum of SGD (for adamw: its first beta), 0 <= x < 1."
    )
    weight_decay: Annotated[Number, Field(ge=0)] = Field(
        default=1e-4, description="Weight decay (for sgd: the factor of the L2 penalty)."
    )
    accumulate: Count = Field(
        default=1,
        description="Parts in which a batch is computed before the weights change; more parts need"
        " less memory. 1: off.",
    )
    clip_grad: Annotated[Number, Field(ge=0)] = Field(
        default=0.0, description="Largest norm of the gradient; longer ones are cut. 0: off."
    )
    ema_decay: Fraction = Field(
        default=0.0,
        description="Decay per step of the moving average of the weights, which is then evaluated"
        " (for example 0.9999); 0: off.",
    )
    amp: bool = Field(
        default=False,
        description="true: mixed precision (bfloat16 where the device has it, else float16).",
    )
    sync_bn: bool = Field(
        default=False,
        description="true: batch normalisation over the images of all GPUs together (SyncBatchNorm)"
        " instead of each GPU's own.",
    )
    compile: bool = Field(
        default=False,
        description="true: torch.compile, and without TRAIN.accumulate CUDA graphs; slower to"
        " start, then faster.",
    )
    channels_last: bool = Field(
        default=False, description="true: channels_last memory layout; faster convolutions on GPUs."
    )
    manual_seed: Index | None = Field(
        default=None,
        description="Seed of the weights, the order and the augmentation; empty: a new one is"
        " drawn and recorded.",
    )
    deterministic: bool = Field(
        default=False,
        description="true: only deterministic operations, slower; with manual_seed, two runs on"
        " one machine are equal bit for bit.",
    )
    print_freq: Count = Field(
        default=10, description="Steps between two lines of progress where there is no terminal."
    )
    save_freq: Count = Field(
        default=1, description="Epochs between two checkpoints; the best is always kept."
    )
    save_every_steps: Index = Field(
        default=0,
        description="Steps between two checkpoints within an epoch, so that a run that dies loses"
        " no more than these; 0: only at the epochs' ends.",
    )
    on_divergence: Literal["stop", "rollback"] = Field(
        default="stop",
        description="What a loss, gradient or weight that is not finite does: stop ends the run;"
        " rollback goes back to the last checkpoint and on with a lower learning rate. Nothing of"
        " it is saved, and diverged_batch.txt lists the batch's images.",
    )
    rollbacks: Index = Field(
        default=3, description="on_divergence rollback: how often at most; then the run ends."
    )
    rollback_lr_factor: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.1, description="Factor of the learning rate after each rollback."
    )
    save_path: Text | None = Field(
        default=None,
        description="Folder of the run; a trailing /model, as in old files, is left off. Empty:"
        " exp/DATASET/NAME.",
    )
    weight: Text | None = Field(
        default=None, description="Checkpoint whose weights training starts from; empty: none."
    )
    weight_head: bool = Field(
        default=True,
        description="false: `weight` is loaded without the classifier fc (for other classes).",
    )
    resume: Text | None = Field(
        default=None,
        description="Checkpoint of an interrupted run to go on from; auto: the latest of this run's"
        " folder; empty: none.",
    )
    evaluate: bool = Field(
        default=True, description="true: evaluate on the validation images after every epoch."
    )
    time_breakdown: bool = Field(
        default=False,
        description="Not used any more; the time spent waiting for data is always reported.",
        json_schema_extra={"note": "has no effect: the share of data waiting is always reported"},
    )

    @model_validator(mode="before")
    @classmethod
    def _hybrid_by_its_layer_types(cls, values: Any) -> Any:
        """Take old files that give layer_types without arch, as later ones do, for hybrid."""
        if isinstance(values, dict) and "layer_types" in values:
            unnamed = "arch" not in values and "model" not in values
            return values | {"arch": "hybrid"} if unnamed else values
        return values


class DistributedConfig(Section):
    """Training with several processes."""

    dist_url: Text = Field(
        default="tcp://127.0.0.1:6789",
        description="Where several machines meet: tcp://HOST:PORT of machine 0, or env:// to take"
        " it from the environment. One machine alone takes a free port.",
    )
    dist_backend: Literal["nccl", "gloo", "mpi"] = Field(
        default="nccl",
        description="Communication library of GPUs: nccl or gloo; CPUs always use gloo.",
    )
    multiprocessing_distributed: bool = Field(
        default=False,
        description="Kept for old files: true and false both give one process per GPU.",
    )
    world_size: Annotated[int, Field(ge=-1)] = Field(
        default=1, description="Number of machines; -1: from the environment (WORLD_SIZE)."
    )
    rank: Annotated[int, Field(ge=-1)] = Field(
        default=0, description="This machine's number, from 0; -1: from the environment (RANK)."
    )
    timeout_minutes: Annotated[Number, Field(gt=0)] = Field(
        default=10.0,
        description="Minutes after which a process that does not answer ends the run.",
    )


class TestConfig(Section):
    """Testing a checkpoint."""

    # Keeps pytest from collecting a class whose name starts with Test.
    __test__ = False

    use_val_set: bool = Field(
        default=True,
        description="true: test on the validation images; false: on the test images (test/,"
        " test_init.pt, test_imgs.pt or test.txt).",
    )
    test_gpu: Gpus = Field(
        default=[0], description="Index of the GPU to test on; where there is no GPU, the CPU."
    )
    test_workers: Workers = Field(
        default=4, description="Processes that read and decode images; 0: in the main process."
    )
    batch_size_test: Count = Field(default=100, description="Images per step.")
    model_path: Text | None = Field(
        default=None,
        description="Checkpoint to test. Empty: model/model_best.pth in the run's folder.",
    )


class Config(Section):
    """A whole configuration; `sanctl.config.load` reads and checks one."""

    DATA: DataConfig
    TRAIN: TrainConfig
    Distributed: DistributedConfig = DistributedConfig()
    TEST: TestConfig = TestConfig()

    @property
    def run_dir(self) -> Path:
        """The run's folder: `TRAIN.save_path` without the trailing `model` of old files."""
        if self.TRAIN.save_path is not None:
            path = Path(self.TRAIN.save_path)
            return path.parent if path.name == "model" else path
        dataset = self.DATA.data_name or Path(self.DATA.data_root).name
        return Path("exp") / dataset / (self.TRAIN.model or self.TRAIN.arch or "run")


# The keys that describe a network beside arch and layers, and the archs that take them.
ARCHS_OF_KEY: dict[str, tuple[str, ...]] = {
    "layer_types": ("hybrid",),
    "sa_type": ("san", "hybrid"),
    "widths": ("san", "hybrid"),
    "kernels": ("san",),
    "added_nl_blocks": ("hybrid",),
}
SECTIONS: dict[str, type[Section]] = {
    "DATA": DataConfig,
    "TRAIN": TrainConfig,
    "Distributed": DistributedConfig,
    "TEST": TestConfig,
}
KEYS: tuple[str, ...] = tuple(
    f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields
)
