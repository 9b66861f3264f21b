"""Loaders: from a source's encoded images to batches of uint8 tensors, in worker processes.

Batches are uint8 until they are on the device: a quarter of the bytes to hand over, and the
conversion costs nothing there.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

from sanctl.config.schema import DataConfig
from sanctl.data.decode import ImageError, decode_image
from sanctl.data.sampler import WHOLE, EpochSampler, Key, Share, sample_seed
from sanctl.data.source import ImageSource
from sanctl.data.transforms import Transform, eval_transform, train_transform
from sanctl.data.workers import Workers
from sanctl.errors import UserError


class Skipped(NamedTuple):
    """An image that was left out: its number, what it is called, and what is wrong with it."""

    number: int
    name: str
    reason: str


class Batch(NamedTuple):
    """Images of one step: uint8 (N, C, H, W), their classes and their numbers: int64 (N,).

    Images that cannot be read, where they do not end the run, are in `skipped` and nowhere else:
    N is smaller by their number, and may be 0.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    skipped: tuple[Skipped, ...] = ()


class BatchDataset:
    """Makes one batch of a list of keys.

    Args:
        source: The encoded images.
        transform: Applied to each image.
        channels: 1 or 3.
        seed: Of the random draws; None where the transform makes none.
        skip: Whether an image that cannot be read is left out instead of being an error.
        blank: What a batch without images is made of; None leaves it empty.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        channels: int,
        seed: int | None,
        skip: bool = False,
        blank: Batch | None = None,
    ) -> None:
        self._source = source
        self._transform = transform
        self._channels = channels
        self._seed = seed
        self._skip = skip
        self._blank = blank

    def __getitem__(self, keys: list[Key]) -> Batch | UserError:
        """The batch, or the error that names the image which cannot be read.

        The error is returned, not raised, as `Workers` wants it.
        """
        images, indices, skipped = [], [], []
        # Transforms draw from the default generator: it is lent to each sample with a seed of its
        # own, and the process gets its own state back.
        with _one_thread(), torch.random.fork_rng(devices=[]):
            for epoch, index in keys:
                try:
                    images.append(self._image(epoch, index))
                    indices.append(index)
                except ImageError as error:
                    if not self._skip:
                        return UserError(f"{error}; or leave it out: -o DATA.bad_images=skip")
                    skipped.append(Skipped(index, error.name, error.reason))
        if not images and self._blank is not None:
            return self._blank._replace(skipped=tuple(skipped))
        numbers = torch.tensor(indices, dtype=torch.int64)
        targets = torch.from_numpy(self._source.targets)[numbers]
        stacked = default_collate(images) if images else torch.empty(0, dtype=torch.uint8)
        return Batch(stacked, targets, numbers, tuple(skipped))

    def _image(self, epoch: int, index: int) -> torch.Tensor:
        pixels = decode_image(self._source.read(index), self._channels, self._source.name(index))
        if self._seed is not None:
            # torch.manual_seed would seed the devices as well.
            torch.default_generator.manual_seed(sample_seed(self._seed, epoch, index))
        return self._transform(torch.from_numpy(pixels).permute(2, 0, 1))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Single images are too small to share: threads would wait for each other for longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TrainLoader:
    """Batches of training images, epoch by epoch; `len()` is the steps of an epoch.

    Attributes:
        blank: What a process computes on that has no image of a step; None for one alone.
    """

    def __init__(
        self, workers: Workers[list[Key], Batch], sampler: EpochSampler, blank: Batch | None
    ) -> None:
        self._workers = workers
        self._sampler = sampler
        self.blank = blank

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            epoch: Number of the epoch; with the seed it decides order and draws.
            start_step: The steps before it are left out, without reading their images.

        Raises:
            UserError: An image cannot be read or decoded; the message names it.
            SanctlError: A worker process died.
        """
        self._sampler.set(epoch, start_step)
        return iter(self._workers)

    def batch_length(self, step: int) -> int:
        """Images of a step, over all processes; steps are counted from 0."""
        return self._sampler.batch_length(step)


class EvalLoader:
    """Batches of evaluation images, in the source's order, every one once."""

    def __init__(self, workers: Workers[list[Key], Batch], sampler: EpochSampler) -> None:
        self._workers = workers
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._workers)

    def batch_length(self, step: int) -> int:
        """Images of a step, over all processes; steps are counted from 0."""
        return self._sampler.batch_length(step)


def train_loader(
    source: ImageSource,
    data: DataConfig,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    share: Share = WHOLE,
    ignore_label: int = -1,
) -> TrainLoader:
    """A loader of randomly cropped and flipped images in random order.

    Args:
        source: The training split.
        data: Gives the number of channels and the size.
        batch_size: Images of a step; the last step of an epoch may have fewer.
        workers: Processes that read and decode; 0 does so in this process.
        seed: Not negative; order and draws follow from it.
        share: The part of each step's images that this process gets.
        ignore_label: The class of the blank images that it gets where its part is empty.
    """
    transform = train_transform(data.image_size)
    blank = _blank(data, share, ignore_label)
    dataset = BatchDataset(source, transform, data.in_chans, seed, _skips(data), blank)
    sampler = EpochSampler(len(source), batch_size, seed, share)
    return TrainLoader(_start(dataset, sampler, workers), sampler, blank)


def eval_loader(
    source: ImageSource,
    data: DataConfig,
    *,
    batch_size: int,
    workers: int,
    share: Share = WHOLE,
    ignore_label: int = -1,
) -> EvalLoader:
    """A loader of resized and centrally cropped images in the source's order.

    Arguments as those of `train_loader`.
    """
    transform = eval_transform(data.resize, data.image_size)
    blank = _blank(data, share, ignore_label)
    dataset = BatchDataset(source, transform, data.in_chans, None, _skips(data), blank)
    sampler = EpochSampler(len(source), batch_size, seed=None, share=share)
    return EvalLoader(_start(dataset, sampler, workers), sampler)


def _blank(data: DataConfig, share: Share, ignore_label: int) -> Batch | None:
    """What a process computes on that has no image of a step, so that it takes part in the step.

    Two images, since batch normalisation takes no variance of one. A process alone needs none.
    """
    if share.size == 1:
        return None
    size = (2, data.in_chans, data.image_size, data.image_size)
    targets = torch.full((2,), ignore_label)
    indices = torch.empty(0, dtype=torch.int64)
    return Batch(torch.zeros(size, dtype=torch.uint8), targets, indices)


def _skips(data: DataConfig) -> bool:
    return data.bad_images == "skip"


def _start(dataset: BatchDataset, sampler: EpochSampler, workers: int) -> Workers[list[Key], Batch]:
    return Workers(dataset.__getitem__, sampler, workers, pin_memory=torch.cuda.is_available())
