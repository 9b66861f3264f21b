"""Which samples make up which batch of which epoch, and the seeds of their random draws.

The order of an epoch is a function of (seed, epoch) and the draws of a sample are one of
(seed, epoch, index), so that neither depends on the number of workers, nor on that of processes
that train together, and an epoch can go on in the middle.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int]
"""The epoch and the index of a sample."""

_ORDER, _DRAWS = 0, 1  # keep the two kinds of seeds apart


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The permutation of 0..length-1 in which an epoch visits its samples."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(length)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The 64-bit seed of the random draws of one sample in one epoch."""
    return int(np.random.SeedSequence([_DRAWS, seed, epoch, index]).generate_state(1, np.uint64)[0])


class Share(NamedTuple):
    """Which part of every batch a process has: part `rank` of `size` that differ by one at most.

    Where a batch has fewer samples than there are processes, the last ones have none; rank 0
    always has some.
    """

    rank: int = 0
    size: int = 1

    def of(self, batch: np.ndarray) -> np.ndarray:
        """This part of a batch."""
        return np.array_split(batch, self.size)[self.rank]


WHOLE = Share()


class EpochSampler(Sampler[list[Key]]):
    """The batches of one epoch as lists of keys; `set` says which, and from which step on.

    Args:
        length: Number of samples.
        batch_size: Samples of a whole batch; the last of an epoch may have fewer.
        seed: Of the order; None keeps the samples in theirs.
        share: The part of each batch that is yielded; it may be empty.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int | None, share: Share = WHOLE
    ) -> None:
        self._length = length
        self._batch_size = batch_size
        self._seed = seed
        self._share = share
        self._epoch = 0
        self._start_step = 0

    def set(self, epoch: int, start_step: int) -> None:
        """Choose the epoch that the next iteration goes through, and the step it starts at."""
        self._epoch, self._start_step = epoch, start_step

    def __len__(self) -> int:
        """The steps of a whole epoch."""
        return -(-self._length // self._batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self._epoch
        if self._seed is None:
            order = np.arange(self._length)
        else:
            order = epoch_order(self._seed, epoch, self._length)
        for step in range(self._start_step, len(self)):
            begin = step * self._batch_size
            batch = order[begin : begin + self._batch_size]
            yield [(epoch, int(index)) for index in self._share.of(batch)]

    def batch_length(self, step: int) -> int:
        """How many samples the whole batch of a step has; steps are counted from 0."""
        return min(self._batch_size, self._length - step * self._batch_size)
