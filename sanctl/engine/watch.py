"""What is read off a running epoch: its losses, its speed, and the share of time spent waiting."""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sanctl.errors import SanctlError

T = TypeVar("T")

WINDOW = 50  # steps over which speed is averaged


class DivergedError(SanctlError):
    """Training has left the finite numbers; the message says when, and what to try."""

    def __init__(self, what: str, epoch: int, step: int, lr: float) -> None:
        super().__init__(
            f"{what} at epoch {epoch}, step {step}, learning rate {lr:g}: stopped, nothing of "
            "this epoch is saved; try a lower TRAIN.base_lr, TRAIN.warmup_epochs or TRAIN.clip_grad"
        )


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and buffers are; waits for the device."""
    tensors = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


class _Pending(NamedTuple):
    epoch: int
    step: int
    lr: float
    loss: Tensor
    ready: torch.cuda.Event | None


class LossWatch:
    """Reads losses off the device and stops the run at the first that is not finite.

    On a GPU each loss is read while the next step is under way, so that the host never waits for
    the device to run dry; by then one more step may have been computed, but nothing is saved
    before `flush` has seen every loss.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self._pending: _Pending | None = None

    def push(self, epoch: int, step: int, lr: float, loss: Tensor) -> None:
        """Note the loss of a step, and check the one before it (on a CPU, this one too).

        Raises:
            DivergedError: a loss is not finite; names its epoch, step and learning rate.
        """
        self.flush()
        if loss.device.type != "cuda":
            self._pending = _Pending(epoch, step, lr, loss, None)
            self.flush()
            return
        host = torch.empty_like(loss, device="cpu", pin_memory=True)
        host.copy_(loss, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self._pending = _Pending(epoch, step, lr, host, ready)

    def flush(self) -> None:
        """Check the loss still outstanding.

        Raises:
            DivergedError: it is not finite.
        """
        if self._pending is None:
            return
        epoch, step, lr, loss, ready = self._pending
        self._pending = None
        if ready is not None:
            ready.synchronize()
        self.last = float(loss)
        if not math.isfinite(self.last):
            raise DivergedError(f"the loss is {self.last}", epoch, step, lr)


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
