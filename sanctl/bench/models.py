"""`bench-models`: speed, memory and FLOP/s of networks, interleaved in one run.

Every round runs each network for a few steps, so that a drift of the machine's speed hits all of
them alike. Times are wall-clock times between two moments at which the device has nothing left to
do; on a GPU, two steps that are not timed come first in each round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from sanctl.bench.network import ModelSettings, RunningNetwork, count_flops
from sanctl.bench.timing import is_out_of_memory, on_device, synchronize
from sanctl_models import create_model, min_input_size

_STEPS = {"cuda": 10, "cpu": 1}
_UNTIMED_STEPS = {"cuda": 2, "cpu": 0}
_WARM_UP_STEPS = {"cuda": 3, "cpu": 1}


@dataclass(frozen=True)
class ModelRecord:
    """What was measured of a network.

    Attributes:
        network: Its name.
        batch: Images in a step.
        step_seconds: The mean time of a step in each round; empty where the network did not run.
        ratio: Its speed over the reference's, the median over the rounds; None where one of the
            two did not run.
        peak: The most bytes that a step held, of this network alone: its weights, optimizer's
            state and batch, and what was allocated on top during steps. None on a CPU.
        flop_per_image: Floating-point operations of a step per image.
        failure: Why it did not run, empty where it did.
    """

    network: str
    batch: int
    step_seconds: tuple[float, ...] = ()
    ratio: float | None = None
    peak: int | None = None
    flop_per_image: float | None = None
    failure: str = ""

    @property
    def step_median(self) -> float | None:
        """The median time of a step over the rounds, in seconds."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    @property
    def images_per_s(self) -> float | None:
        """Images in a second at the median time."""
        return None if self.step_median is None else self.batch / self.step_median

    @property
    def flop_per_s(self) -> float | None:
        """Floating-point operations in a second at the median time."""
        if self.images_per_s is None or self.flop_per_image is None:
            return None
        return self.images_per_s * self.flop_per_image

    def as_row(self) -> dict[str, object]:
        """Return everything for a file, units in the keys."""
        return {
            "network": self.network,
            "rounds": len(self.step_seconds),
            "images_per_s": self.images_per_s,
            "step_median_s": self.step_median,
            "step_least_s": min(self.step_seconds, default=None),
            "step_most_s": max(self.step_seconds, default=None),
            "ratio_to_reference": self.ratio,
            "peak_bytes": self.peak,
            "flop_per_image": self.flop_per_image,
            "flop_per_s": self.flop_per_s,
            "failure": self.failure or None,
        }


@dataclass
class _Entry:
    """A network in the run; `running` is None once it has failed."""

    running: RunningNetwork | None
    seconds: list[float]
    peak: int | None = None
    failure: str = ""


def bench_models(
    names: Sequence[str],
    reference: str,
    settings: ModelSettings,
    rounds: int,
    device: torch.device,
    advance: Callable[[], object] = lambda: None,
) -> list[ModelRecord]:
    """Run networks by turns.

    The operators' backend and torch's precision are those that the caller has set.

    Args:
        names: Networks of the registry.
        reference: The one of them that the others are compared with.
        settings: How they are run.
        rounds: How often each has its turn.
        device: Where to compute.
        advance: Called `len(names) * (rounds + 1)` times on the way: when a network is warmed up,
            and after each of its rounds.

    Returns:
        A record of each network; a network for which images or memory are too small says so.
    """
    with on_device(device), _room_to_compile(len(names), settings):
        entries: dict[str, _Entry] = {}
        for name in names:
            entries[name] = _start(name, settings, device)
            advance()
        for _ in range(rounds):
            for entry in entries.values():
                if entry.running is not None:
                    _run_round(entry, entry.running, device)
                advance()
    return [_record(name, entries, reference, settings) for name in names]


def _room_to_compile(count: int, settings: ModelSettings) -> AbstractContextManager[object]:
    """Let torch.compile keep the code of all networks, which share their `forward`."""
    if not settings.compiled:
        return nullcontext()
    from torch._dynamo import config

    return config.patch(recompile_limit=config.recompile_limit + count)


def _start(name: str, settings: ModelSettings, device: torch.device) -> _Entry:
    with torch.device("meta"):
        smallest = min_input_size(create_model(name))
    if settings.size < smallest:
        return _Entry(None, [], failure=f"needs images of at least {smallest} px")
    entry = _Entry(None, [])

    def warm_up() -> None:
        entry.running = RunningNetwork(name, settings, device)
        for _ in range(_WARM_UP_STEPS[device.type]):
            entry.running.step()
        synchronize(device)

    _unless_memory_is_short(entry, device, warm_up)
    return entry


def _run_round(entry: _Entry, running: RunningNetwork, device: torch.device) -> None:
    def timed() -> None:
        for _ in range(_UNTIMED_STEPS[device.type]):
            running.step()
        synchronize(device)
        before = _reset_peak(device)
        start = time.perf_counter()
        for _ in range(_STEPS[device.type]):
            running.step()
        synchronize(device)
        entry.seconds.append((time.perf_counter() - start) / _STEPS[device.type])
        if before is not None:
            on_top = torch.cuda.max_memory_allocated(device) - before
            entry.peak = max(entry.peak or 0, running.held_bytes() + on_top)

    _unless_memory_is_short(entry, device, timed)


def _reset_peak(device: torch.device) -> int | None:
    """Have the peak of memory start anew; return what is held now, None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _unless_memory_is_short(
    entry: _Entry, device: torch.device, action: Callable[[], None]
) -> None:
    """Do something; where memory does not suffice, or a batch is too small, the network fails."""
    try:
        action()
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failure = "out of memory"
    except ValueError as error:  # of batch normalisation, where there is but one value
        failure = str(error)
    entry.running, entry.seconds, entry.peak, entry.failure = None, [], None, failure
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _record(
    name: str, entries: Mapping[str, _Entry], reference: str, settings: ModelSettings
) -> ModelRecord:
    entry, other = entries[name], entries[reference]
    if entry.failure:
        return ModelRecord(name, settings.batch, failure=entry.failure)
    ratio = None
    if not other.failure:
        pairs = zip(other.seconds, entry.seconds, strict=True)
        ratio = statistics.median(theirs / own for theirs, own in pairs)
    return ModelRecord(
        network=name,
        batch=settings.batch,
        step_seconds=tuple(entry.seconds),
        ratio=ratio,
        peak=entry.peak,
        flop_per_image=count_flops(name, settings),
    )
