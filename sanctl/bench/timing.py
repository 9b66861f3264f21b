"""Times of calls, the bandwidth of a copy, and peak memory.

On a GPU a sample lies between two CUDA events around several calls, one after another. A kernel
that does nothing but wait is queued before the first event, so that the host has queued all calls
before the GPU begins with them and the time holds no launch overhead: whether it had is looked up
afterwards, and the wait is made longer and the sample taken again where it had not. (Calls that
themselves wait for the GPU, or that queue more than the driver takes, keep their overhead.) On a
CPU a sample is the wall-clock time of one call.

Calls take turns with different inputs, and their latest results are kept: neither is in the cache
when its turn comes again, but for the smallest on a CPU (see `sets_to_forget`). Each call runs
before the first sample to warm up.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]

_FORGET = 3  # inputs that take turns are together this many times the size of the cache
_COPIED = {"cuda": 16, "cpu": 4}  # a tensor that is copied is this many times as large
_ASSUMED_CPU_CACHE = 64 << 20
_MOST_CALLS_IN_SAMPLE = 8
_LEAST_SAMPLES, _MOST_SAMPLES = {"cuda": 10, "cpu": 5}, 100
_BUDGET = 0.1  # seconds of samples
_FIRST_WAIT, _LONGEST_WAIT = 1 << 22, 1 << 26  # cycles of the GPU's clock, 2 and 34 ms at 2 GHz


@dataclass(frozen=True)
class Timing:
    """Times of one call in seconds: median, and the limits of the middle 80 % of the samples."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarise at least two samples in seconds."""
        # Unlike those of the module statistics, these keep their order where samples are equal.
        p10, median, p90 = np.quantile(samples, (0.1, 0.5, 0.9)).tolist()
        return cls(median, p10, p90, len(samples))

    @property
    def spread(self) -> float:
        """The width of the middle 80 % of the samples, as a share of the median."""
        return (self.p90 - self.p10) / self.median


def cache_bytes(device: torch.device) -> int:
    """Return the size of the GPU's L2 cache; for a CPU, 64 MiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return _ASSUMED_CPU_CACHE


def time_calls(calls: Sequence[Call], device: torch.device) -> Timing:
    """Time calls that do the same work on different inputs.

    Samples are taken for a tenth of a second, at least 5 of them (10 on a GPU), at most 100.

    Args:
        calls: They take turns.
        device: Where they compute; the current device, if it is a GPU.

    Returns:
        The times of a single call.
    """
    turns = _turns(calls)
    for _ in range(len(calls) + 1):  # the last one needs memory beside all the results
        next(turns)
    synchronize(device)
    sampler = _GpuSampler(len(calls)) if device.type == "cuda" else _cpu_sample
    samples: list[float] = []
    end = time.perf_counter() + _BUDGET
    while len(samples) < _LEAST_SAMPLES[device.type] or time.perf_counter() < end:
        samples.append(sampler(turns))
        if len(samples) == _MOST_SAMPLES:
            break
    return Timing.of(samples)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bandwidth of a copy in bytes/s, those read and those written both counted.

    The tensor that is copied is several times as large as the cache.
    """
    size = _COPIED[device.type] * cache_bytes(device)
    source = torch.arange(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copies: list[Call] = [lambda: target.copy_(source)] * 4
    return 2 * source.nbytes / time_calls(copies, device).median


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Return the bytes that a call holds at its peak beyond what was held before it.

    None on a CPU, where torch does not count them.
    """
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def sets_to_forget(size: int, device: torch.device) -> int:
    """Return how many sets of `size` bytes must take turns to find none in the cache, at least 2.

    On a CPU at most 8, of which the default benchmark is done in under a minute.
    """
    count = max(2, math.ceil(_FORGET * cache_bytes(device) / size))
    return count if device.type == "cuda" else min(count, 8)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current device within a block."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether memory, of a GPU or of the machine, did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _turns(calls: Sequence[Call]) -> Iterator[None]:
    """Make the next call at each step; a result lives until the call's next one is there."""
    results: list[object] = [None] * len(calls)
    for index in itertools.cycle(range(len(calls))):
        results[index] = calls[index]()
        yield


def _cpu_sample(turns: Iterator[None]) -> float:
    start = time.perf_counter()
    next(turns)
    return time.perf_counter() - start


class _GpuSampler:
    """Takes samples of one turn of all calls, or of 8 calls where there are more."""

    def __init__(self, calls: int) -> None:
        self._calls = min(calls, _MOST_CALLS_IN_SAMPLE)
        self._wait = _FIRST_WAIT

    def __call__(self, turns: Iterator[None]) -> float:
        while True:
            seconds, host_was_ahead = self._sample(turns)
            if host_was_ahead or self._wait >= _LONGEST_WAIT:
                return seconds
            self._wait *= 2

    def _sample(self, turns: Iterator[None]) -> tuple[float, bool]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._wait)
        start.record()
        for _ in range(self._calls):
            next(turns)
        end.record()
        host_was_ahead = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / self._calls, host_was_ahead
