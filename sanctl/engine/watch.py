"""What is read off a running epoch: its speed, and the share of time spent waiting."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

WINDOW = 50  # steps over which speed is averaged


class StepClock:
    """Speed of the last steps and the share of their time spent waiting for data."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._ends = deque([self._started], maxlen=WINDOW + 1)
        self._waits: deque[float] = deque(maxlen=WINDOW)
        self._images: deque[int] = deque(maxlen=WINDOW)
        self._own: deque[int] = deque(maxlen=WINDOW)
        self._arrived = self._started
        self._total_wait = 0.0
        self._total_images = 0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on, and note when each has come from its loader."""
        for batch in batches:
            self._arrived = time.perf_counter()
            yield batch

    def step_done(self, images: int, own: int) -> None:
        """The batch's step has been computed (or queued, on a GPU).

        Args:
            images: of the batch, over all processes.
            own: this process's part of them.
        """
        wait = self._arrived - self._ends[-1]
        self._waits.append(wait)
        self._images.append(images)
        self._own.append(own)
        self._ends.append(time.perf_counter())
        self._total_wait += wait
        self._total_images += images

    @property
    def images_per_s(self) -> float:
        """Images per second over the last steps, of all processes."""
        return sum(self._images) / max(self._ends[-1] - self._ends[0], 1e-9)

    @property
    def own_images_per_s(self) -> float:
        """Images per second over the last steps, of this process."""
        return sum(self._own) / max(self._ends[-1] - self._ends[0], 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of the last steps' time spent waiting for data, 0 to 1."""
        return sum(self._waits) / max(self._ends[-1] - self._ends[0], 1e-9)

    def timing(self) -> dict[str, float]:
        """Of all steps: seconds, images_per_s, and data_wait as a share of the seconds."""
        seconds = max(self._ends[-1] - self._started, 1e-9)
        return {
            "seconds": seconds,
            "images_per_s": self._total_images / seconds,
            "data_wait": self._total_wait / seconds,
        }
