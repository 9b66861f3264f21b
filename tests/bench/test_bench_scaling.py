"""Networks on one device and on several: real processes, which talk through gloo."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from starved import Shortage
from team_run import run_team
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from sanctl.bench.network import ModelSettings, RunningNetwork
from sanctl.bench.scaling import ScalingRecord, bench_scaling
from sanctl.engine.interrupt import StopRequest
from sanctl.engine.team import ProcessTeam
from sanctl_models import create_model
from sanctl_ops import set_backend

CPU = torch.device("cpu")
ROUNDS = 2
SLOW = 0.5  # s


def test_figures_follow_from_the_times_of_the_rounds() -> None:
    record = ScalingRecord("net", 8, 2, (0.5, 0.25, 1.0), (0.5, 0.5, 1.25), flop_per_image=3e9)
    assert record.scalings == [2, 1, 1.6]
    assert record.scaling == 1.6
    assert record.alone_images_per_s == 16
    assert record.images_per_s == 32
    row = record.as_row()
    assert (row["scaling_least"], row["scaling_most"], row["rounds"]) == (1, 2, 3)
    assert (row["alone_step_median_s"], row["step_median_s"]) == (0.5, 0.5)
    assert row["flop_per_s"] == 96e9
    assert row["failure"] is None


def test_a_network_that_did_not_run_has_no_figures() -> None:
    row = ScalingRecord("net", 8, 2, failure="out of memory").as_row()
    assert {key: value for key, value in row.items() if value is not None} == {
        "network": "net",
        "processes": 2,
        "batch_per_process": 8,
        "rounds": 0,
        "failure": "out of memory",
    }


class Exchanges:
    """A team that counts the steps whose gradients it exchanges."""

    def __init__(self, team: ProcessTeam) -> None:
        self.rank, self.size = team.rank, team.size
        self.gather = team.gather
        self.unsynchronised = team.unsynchronised
        self.steps = 0
        self._team = team

    def replicate(self, model: nn.Module, device: torch.device) -> nn.Module:
        replica: Any = self._team.replicate(model, device)

        def hook(
            state: Any,
            bucket: dist.GradBucket,  # type: ignore[name-defined]
        ) -> torch.futures.Future[torch.Tensor]:
            self.steps += bucket.is_last()
            return allreduce_hook(state, bucket)

        replica.register_comm_hook(dist.group.WORLD, hook)
        return replica


def measure(
    team: ProcessTeam, stop: StopRequest, mode: str, shortage: Shortage | None, *names: str
) -> tuple[list[ScalingRecord], int, int]:
    """The records, the steps in which gradients were exchanged, and the turns."""
    set_backend("torch")
    if shortage is not None:
        shortage.arrange(team.rank)
    turns: list[int] = []
    exchanges = Exchanges(team)
    settings = ModelSettings(mode, batch=2, size=64, channels_last=True)
    records = bench_scaling(
        names, names[0], settings, ROUNDS, CPU, exchanges, lambda: turns.append(1)
    )
    return records, exchanges.steps, len(turns)


@pytest.mark.parametrize(("mode", "exchanged"), [("train", 1 + ROUNDS), ("infer", 0)])
def test_records_of_two_processes(mode: str, exchanged: int) -> None:
    names = ("resnet26", "san10_pairwise")
    (records, *first), (none, *second) = run_team(2, measure, mode, None, *names)
    # One step of warming up and one in each round; those alone exchange nothing.
    assert first == second == [exchanged, len(names) * (ROUNDS + 1)]
    assert none == []
    resnet, san = records
    assert (resnet.network, resnet.batch, resnet.processes) == ("resnet26", 2, 2)
    assert len(resnet.alone_seconds) == len(resnet.together_seconds) == ROUNDS
    assert min(resnet.alone_seconds + resnet.together_seconds) > 0
    assert (resnet.ratio, resnet.peak, resnet.failure) == (1, None, "")
    assert resnet.flop_per_image > 1e8
    assert (san.network, san.ratio, san.images_per_s) == ("san10_pairwise", None, None)
    assert san.failure == "needs images of at least 128 px"


@pytest.mark.parametrize(
    ("shortage", "mode", "process"),
    [
        (Shortage(rank=1, network="resnet26", instance=0, step=0), "train", 1),
        (Shortage(rank=0, network="resnet26", instance=1, step=0), "train", 0),
        (Shortage(rank=1, network="resnet26", instance=0, step=1), "train", 1),
        (Shortage(rank=0, network="resnet26", instance=0, step=0), "train", 0),
        (Shortage(rank=0, network="resnet26", instance=1, step=2), "train", 0),
        (Shortage(rank=1, network="resnet26", instance=0, step=0), "infer", 1),
        (Shortage(rank=0, network="resnet26", instance=0, step=1), "infer", 0),
    ],
    ids=["begin", "begin, first", "try", "try, first", "round", "begin, infer", "round, infer"],
)
def test_memory_short_in_one_process_ends_one_network_in_all(
    shortage: Shortage, mode: str, process: int
) -> None:
    (records, *first), (_, *second) = run_team(2, measure, mode, shortage, "resnet26", "resnet38")
    assert first == second
    failed, other = records
    assert failed.failure == f"out of memory in process {process}"
    assert (failed.scaling, failed.peak, other.ratio) == (None, None, None)
    assert len(other.together_seconds) == ROUNDS


def test_all_are_as_fast_as_the_slowest() -> None:
    (record,), _ = run_team(2, measure_beside_a_slow_process)
    assert record.together_seconds[0] >= SLOW


def measure_beside_a_slow_process(team: ProcessTeam, stop: StopRequest) -> list[ScalingRecord]:
    right = RunningNetwork.step

    def slow_step(network: RunningNetwork) -> None:
        time.sleep(SLOW)
        right(network)

    if team.rank:
        pytest.MonkeyPatch().setattr(RunningNetwork, "step", slow_step)
    settings = ModelSettings("infer", batch=1, size=32)
    return bench_scaling(["resnet26"], "resnet26", settings, 1, CPU, team)


def test_a_batch_too_small_for_every_process_is_told_once() -> None:
    (record,), _ = run_team(2, measure_single_pixels)
    assert "more than 1 value per channel" in record.failure
    assert "process" not in record.failure


def measure_single_pixels(team: ProcessTeam, stop: StopRequest) -> list[ScalingRecord]:
    settings = ModelSettings("train", batch=1, size=32)
    return bench_scaling(["resnet26"], "resnet26", settings, 1, CPU, team)


def test_a_replica_keeps_its_gradients() -> None:
    settings = ModelSettings("train", batch=2, size=64)
    network = RunningNetwork("resnet26", settings, CPU)
    held = network.held_bytes()
    network.replicate(lambda model, device: model)
    weights = sum(weight.nbytes for weight in create_model("resnet26").parameters())
    assert network.held_bytes() == held + weights
