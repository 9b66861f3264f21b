"""`bench-models` with several processes: networks on one device and on all, in the same run.

Every round times each network twice: the first process alone, while the others wait and leave
their devices idle, and then all processes together. A step is of `batch` images in each process, so
that all together do the work of that many steps alone (weak scaling), and as fast as the slowest.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from sanctl.bench.network import ModelSettings, RunningNetwork, count_flops
from sanctl.bench.rounds import (
    failure_of,
    give_memory_back,
    room_to_compile,
    time_round,
    too_small,
    warm_up,
)
from sanctl.bench.timing import is_out_of_memory, on_device
from sanctl.errors import SanctlError

T = TypeVar("T")


class Processes(Protocol):
    """This process's place among those that measure, and what they do together."""

    rank: int
    size: int

    def replicate(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The network to train: one whose gradients are the mean over the processes."""

    def unsynchronised(self, replica: Any) -> AbstractContextManager[None]:
        """A context in which the gradients of a replica stay this process's own."""

    def gather(self, value: T) -> list[T]:
        """The plain values of all processes, in rank order, once every one of them has asked."""


@dataclass(frozen=True)
class ScalingRecord:
    """What was measured of a network.

    Attributes:
        network: Its name.
        batch: Images in a step of one process.
        processes: How many there are.
        alone_seconds: The mean time of a step of the first process alone, in each round; empty
            where the network did not run.
        together_seconds: The same while all processes run, in the slowest of them.
        ratio: Its speed on all over the reference's, the median over the rounds; None where one of
            the two did not run.
        peak: The most bytes that a step of all held, in any process; see `warm_up`.
        flop_per_image: Floating-point operations of a step per image.
        failure: Why it did not run, empty where it did.
    """

    network: str
    batch: int
    processes: int
    alone_seconds: tuple[float, ...] = ()
    together_seconds: tuple[float, ...] = ()
    ratio: float | None = None
    peak: int | None = None
    flop_per_image: float | None = None
    failure: str = ""

    @property
    def scalings(self) -> list[float]:
        """The speed of all over that of one, in each round."""
        pairs = zip(self.alone_seconds, self.together_seconds, strict=True)
        return [self.processes * alone / together for alone, together in pairs]

    @property
    def scaling(self) -> float | None:
        """The speed of all over that of one, the median over the rounds."""
        return statistics.median(self.scalings) if self.scalings else None

    @property
    def alone_images_per_s(self) -> float | None:
        """Images in a second on the first device alone, at the median time."""
        return self.batch / statistics.median(self.alone_seconds) if self.alone_seconds else None

    @property
    def images_per_s(self) -> float | None:
        """Images in a second on all devices, at the median time."""
        if not self.together_seconds:
            return None
        return self.processes * self.batch / statistics.median(self.together_seconds)

    def as_row(self) -> dict[str, object]:
        """Return everything for a file, units in the keys."""
        speed, flop = self.images_per_s, self.flop_per_image
        return {
            "network": self.network,
            "processes": self.processes,
            "batch_per_process": self.batch,
            "rounds": len(self.together_seconds),
            "alone_images_per_s": self.alone_images_per_s,
            "images_per_s": speed,
            "scaling": self.scaling,
            "scaling_least": min(self.scalings, default=None),
            "scaling_most": max(self.scalings, default=None),
            "alone_step_median_s": _median(self.alone_seconds),
            "step_median_s": _median(self.together_seconds),
            "ratio_to_reference": self.ratio,
            "peak_bytes": self.peak,
            "flop_per_image": flop,
            "flop_per_s": None if speed is None or flop is None else speed * flop,
            "failure": self.failure or None,
        }


def _median(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def bench_scaling(
    names: Sequence[str],
    reference: str,
    settings: ModelSettings,
    rounds: int,
    device: torch.device,
    processes: Processes,
    advance: Callable[[], object] = lambda: None,
) -> list[ScalingRecord]:
    """Run networks by turns, each on the first device alone and on all; every process calls this.

    The operators' backend and torch's precision are those that the caller has set.

    Args:
        names: Networks of the registry, as `resolve` takes them.
        reference: The one of them that the others are compared with.
        settings: How they are run.
        rounds: How often each has its turn.
        device: Where this process computes.
        processes: Those that measure.
        advance: Called `len(names) * (rounds + 1)` times on the way, in every process: when a
            network is warmed up, and after each of its rounds.

    Returns:
        In the first process a record of each network, in the others nothing; a network for which
        images or memory are too small says so.

    Raises:
        SanctlError: Memory ran out in this process in the middle of a step of all. The others wait
            for it: who has started them must end them.
    """
    with on_device(device), room_to_compile([*names, *names], settings):
        entries: dict[str, _Entry] = {}
        for name in names:
            entries[name] = _Entry(name, settings, device, processes)
            entries[name].start()
            advance()
        for _ in range(rounds):
            for entry in entries.values():
                if not entry.failure:
                    entry.run_round()
                advance()
    if processes.rank:
        return []
    return [entries[name].record(entries[reference]) for name in names]


class _Entry:
    """A network in the run, as one process has it and in step with the others.

    What memory may not suffice for, each process tries by itself before others depend on it, and
    then all know how it went.

    Attributes:
        failure: Why it has left the run, in every process; empty while it is there.
    """

    def __init__(
        self, name: str, settings: ModelSettings, device: torch.device, processes: Processes
    ) -> None:
        self.failure = too_small(name, settings)
        self._name = name
        self._settings = settings
        self._device = device
        self._processes = processes
        self._networks: list[RunningNetwork] = []  # of all processes; of the first alone
        self._alone_seconds: list[float] = []  # in the first process
        self._together_seconds: list[float] = []
        self._peak: int | None = None  # of this process, then of all

    def start(self) -> None:
        """Build the network and warm it up."""
        if self.failure or not self._all_can(self._build):
            return
        if self._settings.trains:
            replica = self._at_once(self._replicate)
            with self._processes.unsynchronised(replica):
                all_can = self._all_can(lambda: self._warm_up(self._networks[0]))
            if not all_can:
                return
            self._at_once(lambda: self._warm_up(self._networks[0]))
        peaks = self._processes.gather(self._peak)
        self._peak = max((peak for peak in peaks if peak is not None), default=None)

    def run_round(self) -> None:
        """Time the network on the first device, then on all."""
        if not self._all_can(self._time_alone):
            return
        own = self._at_once(lambda: time_round(self._networks[0], self._device))
        self._together_seconds.append(max(self._processes.gather(own)))

    def record(self, reference: "_Entry") -> ScalingRecord:
        """What the first process has found."""
        batch, size = self._settings.batch, self._processes.size
        if self.failure:
            return ScalingRecord(self._name, batch, size, failure=self.failure)
        ratio = None
        if not reference.failure:
            pairs = zip(reference._together_seconds, self._together_seconds, strict=True)
            ratio = statistics.median(theirs / own for theirs, own in pairs)
        return ScalingRecord(
            network=self._name,
            batch=batch,
            processes=size,
            alone_seconds=tuple(self._alone_seconds),
            together_seconds=tuple(self._together_seconds),
            ratio=ratio,
            peak=self._peak,
            flop_per_image=count_flops(self._name, self._settings),
        )

    def _all_can(self, action: Callable[[], object]) -> bool:
        """Do what waits for no other process; where any fails, the network leaves the run."""
        failures = self._processes.gather(failure_of(action))
        ranks = [rank for rank, failure in enumerate(failures) if failure]
        if not ranks:
            return True
        where = "" if len(ranks) == len(failures) else f" in process {', '.join(map(str, ranks))}"
        self.failure = f"{failures[ranks[0]]}{where}"
        self._networks.clear()
        give_memory_back(self._device)
        return False

    def _at_once(self, action: Callable[[], T]) -> T:
        """Do what all processes do together, and cannot go on without one of them."""
        try:
            return action()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise SanctlError(
                f"{self._name}: out of memory in process {self._processes.rank} while the others "
                "waited for it; use a smaller batch"
            ) from error

    def _build(self) -> None:
        """Build what all processes run, and in the first what it runs alone; warm that up.

        A network that infers is both. A replica is not: it cannot leave the others out, and what
        training on one device costs is to be known without it.
        """
        self._networks.append(RunningNetwork(self._name, self._settings, self._device))
        if not self._processes.rank and self._settings.trains:
            self._networks.append(RunningNetwork(self._name, self._settings, self._device))
        self._warm_up(self._networks[-1])

    def _replicate(self) -> nn.Module:
        return self._networks[0].replicate(self._processes.replicate)

    def _warm_up(self, network: RunningNetwork) -> None:
        """Warm a network up; note the most that any has held.

        A replica that is recorded in CUDA graphs before it exchanges gradients does not allocate
        its memory again when it does.
        """
        peak = warm_up(network, self._device)
        if peak is not None:
            self._peak = max(peak, self._peak or 0)

    def _time_alone(self) -> None:
        if not self._processes.rank:
            self._alone_seconds.append(time_round(self._networks[-1], self._device))
