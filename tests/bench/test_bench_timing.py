"""Times without a word on how long anything takes."""

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from bench_device import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sanctl.bench.timing import (
    Timing,
    cache_bytes,
    copy_bandwidth,
    is_out_of_memory,
    peak_bytes,
    sets_to_forget,
    time_calls,
)

each_device = pytest.mark.parametrize("name", DEVICES)


def test_median_and_deciles() -> None:
    timing = Timing.of([float(value) for value in (11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6)])
    assert timing == Timing(median=6, p10=2, p90=10, samples=11)
    assert timing.spread == pytest.approx(8 / 6)


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=9), st.integers(2, 40))
def test_deciles_keep_their_order_where_samples_are_equal(values: list[float], times: int) -> None:
    timing = Timing.of(values * times)
    assert min(values) <= timing.p10 <= timing.median <= timing.p90 <= max(values)


@each_device
def test_calls_take_turns_and_their_results_stay(name: str) -> None:
    device = torch.device(name)
    order: list[int] = []
    latest: dict[int, weakref.ref[Tensor]] = {}
    lost: list[int] = []

    def call(index: int) -> Tensor:
        order.append(index)
        lost.extend(each for each, result in latest.items() if result() is None)
        result = torch.ones(100, device=device)
        latest[index] = weakref.ref(result)
        return result

    timing = time_calls([partial(call, index) for index in range(3)], device)
    assert order == [position % 3 for position in range(len(order))]
    assert lost == []
    assert len(order) >= 3 + timing.samples
    assert 5 <= timing.samples <= 100
    assert 0 < timing.p10 <= timing.median <= timing.p90


@each_device
def test_times_are_those_of_one_call(name: str) -> None:
    """Ten copies in one call take longer than one, however many calls make a sample."""
    device = torch.device(name)
    source = torch.zeros(1 << 22, device=device)

    def copies(count: int) -> Callable[[], Tensor]:
        return lambda: torch.stack([source] * count)

    one, ten = (time_calls([copies(count)] * 4, device) for count in (1, 10))
    assert one.median < ten.median


@pytest.mark.parametrize("size", [1, 1 << 20, 50 << 20, 1 << 40])
def test_inputs_together_exceed_the_cache(size: int) -> None:
    cpu = torch.device("cpu")
    count = sets_to_forget(size, cpu)
    assert count >= 2
    assert count == 8 or count * size >= 3 * cache_bytes(cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [1 << 20, 1 << 40])
def test_inputs_together_exceed_the_cache_of_a_gpu(size: int) -> None:
    gpu = torch.device("cuda")
    assert sets_to_forget(size, gpu) >= 2
    assert sets_to_forget(size, gpu) * size >= 3 * cache_bytes(gpu)


@each_device
def test_a_copy_has_a_bandwidth(name: str) -> None:
    assert 1e8 < copy_bandwidth(torch.device(name)) < 1e14


def test_a_cpu_tells_no_peak() -> None:
    assert peak_bytes(lambda: torch.ones(1000), torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_gpu_counts_what_a_call_holds() -> None:
    gpu = torch.device("cuda")
    held = torch.ones(1 << 24, device=gpu)
    assert peak_bytes(lambda: (held + 1).sum(), gpu) == pytest.approx(4 << 24, rel=0.01)


def test_the_machine_s_memory_ends_as_a_gpu_s_does() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("of a GPU"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
