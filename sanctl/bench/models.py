"""`bench-models`: speed, memory and FLOP/s of networks, interleaved in one run.

Every round runs each network for a few steps, so that a drift of the machine's speed hits all of
them alike.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sanctl.bench.network import ModelSettings, RunningNetwork, count_flops
from sanctl.bench.rounds import (
    failure_of,
    give_memory_back,
    room_to_compile,
    time_round,
    too_small,
    warm_up,
)
from sanctl.bench.timing import on_device


@dataclass(frozen=True)
class ModelRecord:
    """What was measured of a network.

    Attributes:
        network: Its name.
        batch: Images in a step.
        step_seconds: The mean time of a step in each round; empty where the network did not run.
        ratio: Its speed over the reference's, the median over the rounds; None where one of the
            two did not run.
        peak: The most bytes that a step held; see `warm_up`.
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
        names: Networks of the registry, as `resolve` takes them.
        reference: The one of them that the others are compared with.
        settings: How they are run.
        rounds: How often each has its turn.
        device: Where to compute.
        advance: Called `len(names) * (rounds + 1)` times on the way: when a network is warmed up,
            and after each of its rounds.

    Returns:
        A record of each network; a network for which images or memory are too small says so.
    """
    with on_device(device), room_to_compile(names, settings):
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


def _start(name: str, settings: ModelSettings, device: torch.device) -> _Entry:
    entry = _Entry(None, [], failure=too_small(name, settings))
    if entry.failure:
        return entry

    def begin() -> None:
        entry.running = RunningNetwork(name, settings, device)
        entry.peak = warm_up(entry.running, device)

    _unless_it_fails(entry, device, begin)
    return entry


def _run_round(entry: _Entry, running: RunningNetwork, device: torch.device) -> None:
    def timed() -> None:
        entry.seconds.append(time_round(running, device))

    _unless_it_fails(entry, device, timed)


def _unless_it_fails(entry: _Entry, device: torch.device, action: Callable[[], None]) -> None:
    """Do something; where it fails, the network leaves the run."""
    failure = failure_of(action)
    if failure:
        entry.running, entry.seconds, entry.peak, entry.failure = None, [], None, failure
        give_memory_back(device)


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
