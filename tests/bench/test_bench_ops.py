"""Records of operators: their figures follow from each other."""

import dataclasses

import pytest
import torch
from bench_device import DEVICES, open_device
from torch import Tensor

from sanctl.bench import unfold
from sanctl.bench.cases import OPERATORS, Case
from sanctl.bench.check import WrongResultError
from sanctl.bench.ops import OpRecord, bench_ops
from sanctl.bench.timing import Timing
from sanctl_ops import requested_backend, set_backend

CPU = torch.device("cpu")
CASE = Case("aggregation", "layer3", "float32", batch=1)


def test_figures_follow_from_times_and_bytes() -> None:
    timing = Timing(median=0.5, p10=0.4, p90=0.7, samples=9)
    record = OpRecord(CASE, "forward", "torch", 1000, 4000.0, timing, 77, unfold_median=2.0)
    assert record.bytes_per_s == 2000
    assert record.share_of_copy == 0.5
    assert record.floor == 0.25
    assert record.speedup == 4
    row = record.as_row()
    assert (row["pass"], row["median_s"], row["p90_s"], row["samples"]) == ("forward", 0.5, 0.7, 9)
    assert (row["moved_bytes"], row["peak_bytes"]) == (1000, 77)


@pytest.mark.parametrize("name", DEVICES)
def test_records(name: str) -> None:
    device, backends = open_device(name)
    cases = [CASE, Case("subtraction2", "layer0", "bfloat16", batch=2)]
    steps = []
    records = bench_ops(cases, backends, device, lambda: steps.append(1))
    assert [(each.case, each.direction, each.backend) for each in records] == [
        (case, direction, backend)
        for case in cases
        for direction in ("forward", "backward")
        for backend in ("unfold", *backends)
    ]
    assert len(steps) == 2 * len(cases) * len(backends)
    assert len({record.copy_bytes_per_s for record in records}) == 1
    for record in records:
        assert record.timing is not None
        assert record.bytes_per_s == record.moved_bytes / record.timing.median
        assert record.speedup == pytest.approx(1) or record.backend != "unfold"
        assert (record.peak is None) == (device.type == "cpu")
    if device.type == "cuda":
        # Unfolding holds a copy of the values for every tap, which a kernel does not.
        peaks = {(r.case.op, r.direction, r.backend): r.peak or 0 for r in records}
        for backend in backends:
            least = peaks["aggregation", "backward", backend]
            assert peaks["aggregation", "backward", "unfold"] > least


def test_the_backend_is_what_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    set_backend("auto")
    bench_ops([CASE], ["torch"], CPU)
    assert requested_backend() == "auto"
    broken = dataclasses.replace(OPERATORS["aggregation"], run=lambda k, x, w: x * w.mean())
    monkeypatch.setitem(OPERATORS, "aggregation", broken)
    with pytest.raises(WrongResultError):
        bench_ops([CASE], ["torch"], CPU)
    assert requested_backend() == "auto"


def test_a_baseline_without_memory_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_too_much(k: int, x: Tensor, w: Tensor) -> Tensor:
        if x.dtype != torch.float64:  # which is the check's
            raise torch.OutOfMemoryError("CUDA out of memory")
        return unfold.aggregation(k, x, w)

    short = dataclasses.replace(OPERATORS["aggregation"], unfold=needs_too_much)
    monkeypatch.setitem(OPERATORS, "aggregation", short)
    for record in bench_ops([CASE], ["torch"], CPU):
        assert (record.timing is None) == (record.backend == "unfold")
        assert record.speedup is None
        assert (record.as_row()["median_s"] is None) == (record.backend == "unfold")
        assert record.floor > 0
