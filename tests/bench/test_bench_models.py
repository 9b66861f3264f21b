"""Networks in turns: ratios, operations and memory, and networks that cannot run."""

from dataclasses import replace

import pytest
import torch
from bench_device import DEVICES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sanctl.bench.models import ModelRecord, bench_models
from sanctl.bench.network import ModelSettings, RunningNetwork, count_flops
from sanctl_models import create_model
from sanctl_ops import set_backend

CPU = torch.device("cpu")
TINY = ModelSettings("infer", batch=2, size=32)


@pytest.fixture(autouse=True)
def _torch_backend() -> None:
    set_backend("torch")


def test_figures_follow_from_the_times_of_the_rounds() -> None:
    record = ModelRecord("net", 8, (0.5, 0.25, 1.0), ratio=2.0, flop_per_image=3e9)
    assert record.step_median == 0.5
    assert record.images_per_s == 16
    assert record.flop_per_s == 48e9
    row = record.as_row()
    assert (row["step_least_s"], row["step_most_s"], row["rounds"]) == (0.25, 1.0, 3)
    assert row["failure"] is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_records(device: str, mode: str) -> None:
    settings = ModelSettings(mode, batch=2, size=64, channels_last=True)
    steps = []
    names = ["resnet26", "san10_pairwise"]
    first, small = bench_models(
        names, "resnet26", settings, 2, torch.device(device), lambda: steps.append(1)
    )
    assert (first.network, small.network) == tuple(names)
    assert len(steps) == len(names) * 3
    assert len(first.step_seconds) == 2
    assert first.ratio == 1
    assert first.images_per_s == 2 / (sum(first.step_seconds) / 2)
    assert (first.peak is None) == (device == "cpu")
    if first.peak is not None:
        weights = sum(p.nbytes for p in create_model("resnet26").parameters())
        copies = 3 if mode == "train" else 1  # gradients and momentum
        assert first.peak > copies * weights
    assert (small.ratio, small.images_per_s, small.flop_per_s) == (None, None, None)
    assert "at least 128 px" in small.failure


@pytest.mark.parametrize("compiled", [True, False])
def test_a_label_overrules_the_settings(compiled: bool) -> None:
    settings = replace(TINY, compiled=compiled)
    for label, expected in (("", compiled), (":eager", False), (":compiled", True)):
        network = RunningNetwork(f"resnet26{label}", settings, CPU)
        assert (network._forward is not network._model) == expected
    (record,) = bench_models(["resnet26:eager"], "resnet26:eager", settings, 1, CPU)
    assert (record.network, record.ratio) == ("resnet26:eager", 1)
    assert record.flop_per_s


def test_a_reference_that_cannot_run_leaves_no_ratio() -> None:
    names = ["resnet26", "san10_patchwise"]
    (record, reference) = bench_models(names, "san10_patchwise", TINY, 1, CPU)
    assert reference.failure
    assert record.images_per_s
    assert record.ratio is None


def test_one_image_on_single_pixels_cannot_be_normalised() -> None:
    settings = ModelSettings("train", batch=1, size=32)
    (record,) = bench_models(["resnet26"], "resnet26", settings, 1, CPU)
    assert "more than 1 value per channel" in record.failure


def test_memory_that_does_not_suffice_ends_one_network() -> None:
    settings = ModelSettings("infer", batch=1 << 40, size=32)
    (record,) = bench_models(["resnet26"], "resnet26", settings, 1, CPU)
    assert record.failure == "out of memory"


@pytest.mark.parametrize("name", ["resnet26", "san10_pairwise", "san10_patchwise", "resnet26_nl"])
def test_operations_are_those_of_a_real_pass(name: str) -> None:
    model = create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, 128, 128))
    settings = ModelSettings("infer", batch=2, size=128)
    assert 2 * count_flops(name, settings) == counter.get_total_flops()


def test_a_training_step_costs_three_passes_but_the_gradient_of_the_images() -> None:
    forward = count_flops("resnet26", ModelSettings("infer", batch=2, size=64))
    first = next(m for m in create_model("resnet26").modules() if isinstance(m, nn.Conv2d))
    assert isinstance(first.stride[0], int)
    first_layer = 2 * first.weight.numel() * (64 // first.stride[0]) ** 2
    trained = count_flops("resnet26", ModelSettings("train", batch=2, size=64))
    assert trained == 3 * forward - first_layer


def test_what_a_network_holds_between_steps() -> None:
    network = RunningNetwork("resnet26", ModelSettings("train", batch=2, size=64), CPU)
    model = create_model("resnet26")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    statistics = sum(buffer.nbytes for buffer in model.buffers())
    batch = 2 * 3 * 64 * 64 * 4 + 2 * 8
    assert network.held_bytes() == weights + statistics + batch
    network.step()
    assert network.held_bytes() == 2 * weights + statistics + batch  # now with the momentum
