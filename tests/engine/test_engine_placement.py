"""Which processes a command stands for, and where it finds itself one of several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Place

from sanctl.config.schema import Config
from sanctl.engine import placement
from sanctl.engine.membership import Membership
from sanctl.engine.placement import LaunchOptions, Placement, member_device, place_processes
from sanctl.errors import UserError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "1234",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "41000",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a machine look as if it had GPUs, to those who only count them."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            placement, "choose_device", lambda name, _: torch.device(name or "cuda:0")
        )

    return have


def config_of(place: Place, *keys: str) -> Config:
    return place.load("TRAIN.batch_size=64", *keys).config


@pytest.mark.parametrize(
    ("count", "listed", "options", "devices"),
    [
        (0, [0], {}, ["cpu"]),
        (0, [0, 1], {}, ["cpu"]),
        (0, [0], {"nproc": 3}, ["cpu"] * 3),
        (4, [0], {}, ["cuda:0"]),
        (4, [1, 3], {}, ["cuda:1", "cuda:3"]),
        (2, [0, 1, 2, 3], {}, ["cuda:0", "cuda:1"]),
        (1, [0, 1, 2, 3], {}, ["cuda:0"]),
        (4, [1, 3], {"device": "cpu"}, ["cpu"]),
        (4, [1, 3], {"device": "cpu", "nproc": 2}, ["cpu", "cpu"]),
        (4, [1, 3], {"device": "cuda:2"}, ["cuda:2"]),
        (4, [1, 3], {"nproc": 2}, ["cuda:1", "cuda:3"]),
        (4, [1, 3], {"nproc": 3}, ["cuda:0", "cuda:1", "cuda:2"]),
        (4, [0], {"gpus": "2, 0"}, ["cuda:2", "cuda:0"]),
        (4, [0], {"gpus": "1", "device": "cuda"}, ["cuda:1"]),
    ],
)
def test_the_devices_of_a_machine(
    place: Place, gpus: Any, count: int, listed: list[int], options: Any, devices: list[str]
) -> None:
    gpus(count)
    found = place_processes(config_of(place, f"TRAIN.train_gpu={listed}"), LaunchOptions(**options))
    assert list(found.devices) == devices
    assert (found.nodes, found.port) == (1, 0)
    assert found.backend == ("gloo" if devices[0] == "cpu" else "nccl")
    assert bool(found.notes) == (count == 2)  # the only case in which some of several are missing


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nproc": 3}, "this machine has 2 GPUs"),
        ({"gpus": "0,2"}, "none is 2"),
        ({"gpus": "0,1", "nproc": 3}, "--gpus 0,1 lists 2"),
        ({"gpus": "-1"}, "as 0,1"),
        ({"device": "cuda:1", "nproc": 2}, "--device cuda:1 is one device"),
    ],
)
def test_what_a_machine_does_not_have(place: Place, gpus: Any, options: Any, words: str) -> None:
    gpus(2)
    with pytest.raises(UserError, match=words):
        place_processes(config_of(place), LaunchOptions(**options))


def test_mpi_is_refused_where_it_would_be_used(place: Place, gpus: Any) -> None:
    config = config_of(place, "Distributed.dist_backend=mpi")
    assert place_processes(config, LaunchOptions(device="cpu")).backend == "gloo"
    gpus(2)
    with pytest.raises(UserError, match="dist_backend mpi"):
        place_processes(config, LaunchOptions())


def test_the_section_distributed_keeps_its_meaning(place: Place) -> None:
    keys = ("Distributed.world_size=3", "Distributed.rank=1", "Distributed.dist_url=tcp://h:77")
    found = place_processes(config_of(place, *keys), LaunchOptions(device="cpu", nproc=2))
    assert found == Placement(("cpu", "cpu"), nodes=3, node=1, host="h", port=77)
    assert found.processes == 6
    options = LaunchOptions("cpu", nproc=2, nnodes=4, node_rank=3, endpoint="other:8")
    found = place_processes(config_of(place, *keys), options)
    assert (found.nodes, found.node, found.host, found.port) == (4, 3, "other", 8)


def test_a_place_under_torchrun() -> None:
    member = Membership.found(TORCHRUN)
    assert member == Membership(3, 4, 1, 2, "node1", 1234, serves=False)
    first = Membership.found(TORCHRUN | {"RANK": "0"})
    assert first is not None
    assert first.serves
    agents = {
        "RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }
    again = Membership.found(TORCHRUN | agents)
    assert again is not None
    assert (again.serves, again.attempt) == (False, 2)
    with pytest.raises(UserError, match="torchrun"):
        Membership.found(TORCHRUN, launching=True)
    with pytest.raises(UserError, match="WORLD_SIZE"):
        Membership.found(TORCHRUN | {"WORLD_SIZE": "many"})


def test_a_place_under_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[03-04]" ] && echo node03 && echo node04\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert Membership.found(SRUN) == Membership(5, 8, 1, 4, "node03", 21000, serves=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        Membership.found(SRUN)
    given = Membership.found(SRUN | {"MASTER_ADDR": "x", "MASTER_PORT": "9"})
    assert given is not None
    assert (given.host, given.port) == ("x", 9)
    # A batch script is no task of srun; and a task may start processes of its own.
    script = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    assert Membership.found(script) is None
    assert Membership.found(SRUN, launching=True) is None
    assert Membership.found({}) is None


@pytest.mark.parametrize(
    ("count", "device", "expected"),
    [
        (0, None, "cpu"),
        (2, "cpu", "cpu"),
        (2, None, "cuda:1"),
        (2, "cuda", "cuda:1"),
        (1, None, "cuda:0"),  # a scheduler shows each process its own
        (4, None, "cuda:3"),  # TRAIN.train_gpu lists as many as there are processes
    ],
)
def test_the_device_of_a_member(
    place: Place, gpus: Any, count: int, device: str | None, expected: str
) -> None:
    gpus(count)
    listed = "TRAIN.train_gpu=[2, 3]" if count == 4 else "TRAIN.train_gpu=[0]"
    member = Membership(3, 4, 1, 2, "h", 1, serves=False)
    config = config_of(place, listed)
    assert member_device(config, LaunchOptions(device), member) == expected


def test_a_member_without_a_gpu(place: Place, gpus: Any) -> None:
    gpus(2)
    member = Membership(2, 3, 2, 3, "h", 1, serves=False)
    with pytest.raises(UserError, match="has no GPU: it has 2"):
        member_device(config_of(place), LaunchOptions(), member)
    with pytest.raises(UserError, match="cpu or cuda"):
        member_device(config_of(place), LaunchOptions("cuda:1"), member)
