"""`bench-ops`: time, bandwidth and memory of every operator, beside the unfolded baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sanctl.bench.backends import backend_set
from sanctl.bench.cases import UNFOLD, Case, InputSet
from sanctl.bench.check import check
from sanctl.bench.timing import (
    Call,
    Timing,
    copy_bandwidth,
    is_out_of_memory,
    on_device,
    peak_bytes,
    sets_to_forget,
    time_calls,
)
from sanctl_ops import set_backend

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class OpRecord:
    """What was measured of one pass of an operator.

    Attributes:
        case: The operator and its inputs.
        direction: "forward" or "backward".
        backend: "unfold" for the baseline, else the operators' backend.
        moved_bytes: What a call must at least read and write.
        copy_bytes_per_s: The bandwidth of a copy, measured in the same run.
        timing: None where memory did not suffice, as for `peak`.
        peak: Bytes held at most beyond the inputs: for backward, by forward and backward together,
            with what is kept between them. None on a CPU, too.
        unfold_median: The baseline's median in seconds, None where its memory did not suffice.
    """

    case: Case
    direction: str
    backend: str
    moved_bytes: int
    copy_bytes_per_s: float
    timing: Timing | None
    peak: int | None
    unfold_median: float | None

    @property
    def floor(self) -> float:
        """The time in seconds in which a copy would move the bytes."""
        return self.moved_bytes / self.copy_bytes_per_s

    @property
    def bytes_per_s(self) -> float | None:
        """The achieved bandwidth."""
        return None if self.timing is None else self.moved_bytes / self.timing.median

    @property
    def share_of_copy(self) -> float | None:
        """The achieved bandwidth as a share of the copy's."""
        return None if self.bytes_per_s is None else self.bytes_per_s / self.copy_bytes_per_s

    @property
    def speedup(self) -> float | None:
        """How many times faster than the baseline this is."""
        if self.timing is None or self.unfold_median is None:
            return None
        return self.unfold_median / self.timing.median

    def as_row(self) -> dict[str, object]:
        """Return everything for a file, units in the keys."""
        timing = self.timing
        return {
            "op": self.case.op,
            "shape": self.case.shape,
            "dtype": self.case.dtype,
            "pass": self.direction,
            "backend": self.backend,
            "batch": self.case.batch,
            "layout": self.case.layout,
            "samples": timing and timing.samples,
            "median_s": timing and timing.median,
            "p10_s": timing and timing.p10,
            "p90_s": timing and timing.p90,
            "floor_s": self.floor,
            "moved_bytes": self.moved_bytes,
            "bytes_per_s": self.bytes_per_s,
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "share_of_copy": self.share_of_copy,
            "speedup_over_unfold": self.speedup,
            "peak_bytes": self.peak,
        }


def bench_ops(
    cases: Sequence[Case],
    backends: Sequence[str],
    device: torch.device,
    advance: Callable[[], object] = lambda: None,
) -> list[OpRecord]:
    """Check all cases, then time each forward and backward, by the baseline and each backend.

    Args:
        cases: What to measure.
        backends: Names of the operators' backends.
        device: Where to compute.
        advance: Called `2 * len(cases) * len(backends)` times on the way: when a case is checked,
            and when it is timed.

    Returns:
        The records, in the order of the cases; of each pass the baseline's first.

    Raises:
        WrongResultError: A result is wrong; nothing was timed.
    """
    with backend_set(), on_device(device):
        for case in cases:
            for backend in backends:
                set_backend(backend)
                check(case, backend, device)
                advance()
        copy = copy_bandwidth(device)
        records = []
        for case in cases:
            records += _bench_case(case, backends, device, copy)
            for _ in backends:
                advance()
        return records


def _bench_case(
    case: Case, backends: Sequence[str], device: torch.device, copy: float
) -> list[OpRecord]:
    set_backend(backends[0])
    first = InputSet.draw(case, device)
    count = sets_to_forget(first.moved_bytes("forward", ()), device)
    sets = [first, *(InputSet.draw(case, device) for _ in range(count - 1))]
    records = []
    for direction in DIRECTIONS:
        unfold_median = None
        for backend in (UNFOLD, *backends):
            timing, peak = _measure(case, direction, backend, sets, device)
            if backend == UNFOLD and timing is not None:
                unfold_median = timing.median
            moved = first.moved_bytes(direction, case.operator.saved)
            records.append(
                OpRecord(case, direction, backend, moved, copy, timing, peak, unfold_median)
            )
    return records


def _measure(
    case: Case, direction: str, backend: str, sets: list[InputSet], device: torch.device
) -> tuple[Timing | None, int | None]:
    """Return the times and the peak of memory; None where it did not suffice."""
    if backend != UNFOLD:
        set_backend(backend)
    measure = _measure_forward if direction == "forward" else _measure_backward
    try:
        return measure(partial(case.run, backend), sets, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None, None


def _measure_forward(
    run: Callable[..., torch.Tensor], sets: list[InputSet], device: torch.device
) -> tuple[Timing, int | None]:
    calls: list[Call] = [partial(run, each.inputs) for each in sets]
    with torch.no_grad():
        timing = time_calls(calls, device)
        return timing, peak_bytes(calls[0], device)


def _measure_backward(
    run: Callable[..., torch.Tensor], sets: list[InputSet], device: torch.device
) -> tuple[Timing, int | None]:
    """Time `torch.autograd.grad` on graphs that are kept, which adds nothing to `.grad`."""

    def both() -> object:
        return torch.autograd.grad(run(sets[0].inputs), sets[0].inputs, sets[0].grad)

    calls: list[Call] = []
    for each in sets:
        output = run(each.inputs)
        calls.append(
            partial(torch.autograd.grad, output, each.inputs, each.grad, retain_graph=True)
        )
    timing = time_calls(calls, device)
    del calls, output  # with the graphs that they keep
    return timing, peak_bytes(both, device)
