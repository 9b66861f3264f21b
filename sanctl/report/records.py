"""What a run tells its reporters: plain values, read by every way of showing them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A training run at its start.

    Attributes:
        dataset: Name of the dataset, as in `sanctl train DATASET NAME`.
        name: Name of the run, as in `sanctl train DATASET NAME`.
        network: What is trained, as a person would call it (a registry name, or arch and layers).
        parameters: Number of trainable values of the network.
        classes: Number of classes.
        train_images: Training images in one epoch.
        val_images: Validation images; 0 where the run does not validate.
        device: The device as text (`cpu`, `NVIDIA H200`).
        precision: The arithmetic as text (`float32`, `bf16`).
        epochs: Last epoch of the run, counted from 1.
        first_epoch: The epoch that this run begins or goes on with, counted from 1.
        steps_per_epoch: Training steps of a whole epoch.
        batch_size: Images in a training step, over all processes.
        run_folder: Where the run writes.
    """

    dataset: str
    name: str
    network: str
    parameters: int
    classes: int
    train_images: int
    val_images: int
    device: str
    precision: str
    epochs: int
    first_epoch: int
    steps_per_epoch: int
    batch_size: int
    run_folder: Path


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of training or of evaluation.

    Attributes:
        epoch: The current epoch, counted from 1.
        epochs: Last epoch of the run.
        step: Steps done of this epoch (so the first record of an epoch says 1).
        steps: Steps of this epoch.
        images_per_s: Images per second, recent or over the epoch so far.
        data_wait: Share of the time spent waiting for data, 0 to 1.
        loss: The loss to show; None where it was not read from the device.
        lr: Learning rate; None in an evaluation.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    images_per_s: float
    data_wait: float
    loss: float | None = None
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What a GPU says of itself; None where it does not tell.

    Attributes:
        utilisation: Percent of the last moments in which a kernel ran.
        memory_used: Memory in use, by all processes, in bytes.
        memory_total: Its memory in bytes.
        power: Watts.
        temperature: Degrees Celsius.
    """

    utilisation: float | None
    memory_used: int | None
    memory_total: int | None
    power: float | None
    temperature: float | None


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one process of a run did lately.

    Attributes:
        rank: Its number among all processes of the run, from 0.
        host: Name of its machine.
        device: Its device as text (`CPU, 2 threads`, `NVIDIA H200 (cuda:0)`).
        step: Steps it has done of this epoch.
        images_per_s: Images per second over its last steps.
        data_wait: Share of their time spent waiting for data, 0 to 1.
        gpu: The state of its GPU; None on a CPU.
    """

    rank: int
    host: str
    device: str
    step: int
    images_per_s: float
    data_wait: float
    gpu: GpuReading | None = None


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One finished epoch.

    Attributes:
        epoch: The epoch, counted from 1.
        epochs: Last epoch of the run.
        values: Column name of `metrics.csv` -> value: `epoch`, `lr`, `loss_train`, `top1_train`,
            `top5_train`, `mIoU_train`, `mAcc_train`, `allAcc_train`, the same six ending in
            `_val` (left out where the run does not validate). top1 and top5 are percent; mIoU,
            mAcc and allAcc fractions, 0 to 1. They are the same in every run of one seed.
        best: Whether this is the best epoch so far.
        timing: `seconds`, `images_per_s` and `data_wait` of the epoch's training, which differ
            from run to run and so stay out of `metrics.csv`.
    """

    epoch: int
    epochs: int
    values: Mapping[str, float]
    best: bool
    timing: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A training run at its end.

    Attributes:
        best_epoch: The best epoch, counted from 1; None where no epoch was finished.
        best_top1: Its top-1, percent.
        seconds: Time that this run took.
        run_folder: Where the run wrote.
    """

    best_epoch: int | None
    best_top1: float | None
    seconds: float
    run_folder: Path


@dataclass(frozen=True, slots=True)
class ClassScore:
    """The scores of one class in a test.

    Attributes:
        name: Class name.
        images: Images of this class.
        top1: Percent of them given this class: the class accuracy times 100.
        top5: Percent of them with this class among the first five.
        iou: Intersection over union, 0 to 1.
    """

    name: str
    images: int
    top1: float
    top5: float
    iou: float


@dataclass(frozen=True, slots=True)
class OverallScore:
    """The scores of a whole test; top1 and top5 are percent, the last three fractions, 0 to 1."""

    images: int
    loss: float
    top1: float
    top5: float
    mean_iou: float
    mean_accuracy: float
    accuracy: float
