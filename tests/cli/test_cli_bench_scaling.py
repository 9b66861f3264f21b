"""`sanctl bench-models` with several processes, as it is typed."""

import csv
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starved import Shortage
from tiny_run import Place

from sanctl.bench import rounds, scaling
from sanctl.cli import bench_scaling
from sanctl.cli.bench_scaling import Job, measure

TWO = (
    *("bench-models", "--models", "resnet26", "--reference", "resnet26", "--size", "64"),
    *("--device", "cpu", "--nproc", "2", "--rounds", "2"),
)


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGQUIT)}
    yield
    for number, handler in before.items():  # torch's agent leaves its own
        signal.signal(number, handler)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_one_process_and_two_are_measured(place: Place, mode: str) -> None:
    done = place.sanctl(
        *(*TWO, "--models", "san10_patchwise", "--mode", mode),
        *("--json", "b.json", "--csv", "b.csv"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("rounds of networks: 6/6 in ")
    assert done.stderr.count("\n") == 1
    title, header, *_ = done.stdout.splitlines()
    assert title == f"{mode}, batch 2 on each of 2 processes, 64 px, float32"
    columns = ["network", "1 process", "2 processes", "scaling", "+-%", "ratio", "peak GiB"]
    assert re.split(" {2,}", header) == columns
    assert "san10_patchwise was not measured: needs images of at least 128 px" in done.stdout
    assert "2 images a step in each" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    data = json.loads((place.folder / "b.json").read_text())
    assert data["device"] == "CPU, 1 thread + CPU, 1 thread"
    assert (data["settings"]["processes"], data["settings"]["batch"]) == (2, 2)
    resnet, san = data["records"]
    assert resnet["images_per_s"] == pytest.approx(4 / resnet["step_median_s"])
    assert resnet["alone_images_per_s"] == pytest.approx(2 / resnet["alone_step_median_s"])
    assert resnet["scaling_least"] <= resnet["scaling"] <= resnet["scaling_most"]
    assert resnet["ratio_to_reference"] == 1
    assert san["images_per_s"] is None
    with (place.folder / "b.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scaling"] for row in rows] == [str(resnet["scaling"]), ""]


def test_no_network_that_runs_is_a_failure(place: Place) -> None:
    names = ("--models", "san10_pairwise", "--reference", "san10_pairwise")
    status, out, err = place.main("bench-models", *names, *TWO[5:])
    assert status == 1
    assert "san10_pairwise was not measured: needs images of at least 128 px" in out
    assert err == "error: none of the networks could be measured\n"


def starved(job: Job) -> Any:
    """Run out of memory in the first step that waits for the others."""
    Shortage(rank=1, network="resnet26", instance=0, step=2).arrange(int(os.environ["RANK"]))
    return measure(job)


def test_memory_short_in_a_step_of_all_ends_them_all(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_scaling, "measure", starved)
    status, out, err = place.main(*TWO)
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("error: resnet26: out of memory in process 1 ")
    assert "batch" in line


def interrupted(job: Job) -> Any:
    """Press Ctrl-C in the first round."""
    right, launcher = rounds.time_round, multiprocessing.parent_process()

    def time_round(*arguments: Any) -> Any:
        assert launcher is not None
        os.kill(launcher.pid or 0, signal.SIGINT)
        patch.undo()
        return right(*arguments)

    patch = pytest.MonkeyPatch()
    if os.environ["RANK"] == "0":
        patch.setattr(scaling, "time_round", time_round)
    return measure(job)


def test_ctrl_c_ends_all_processes_and_writes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_scaling, "measure", interrupted)
    status, out, err = place.main(*TWO, "--rounds", "1000", "--json", "b.json")
    assert (status, out, err) == (130, "", "interrupted; nothing is written\n")
    assert not (place.folder / "b.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpus", "0,2"), ("--gpus 0,2", "has 2 GPUs, none is 2")),
        (("--gpus", "1,1"), ("--gpus 1,1", "different GPU numbers")),
        (("--gpus", "0,x"), ("--gpus 0,x", "GPU numbers, as 0,1")),
        (("--gpus", "1"), ("--gpus 1", "two or more", "--device cuda:1")),
        (("--gpus", "0,1", "--device", "cpu"), ("--gpus 0,1", "leave out --device cpu")),
        (("--gpus", "0,1", "--nproc", "3"), ("--nproc 3", "lists 2")),
        (("--nproc", "3"), ("--nproc 3", "has 2 GPUs", "--device cpu")),
        (("--nproc", "1", "--device", "cpu"), ("--nproc 1", "two or more", "--device cpu")),
        (("--nproc", "2", "--device", "cuda:1"), ("--nproc 2", "cuda:1 is one device")),
        (("--nproc", "2", "--device", "tpu"), ("--nproc 2", "use cpu or cuda")),
        (("--nproc", "2", "--device", "cpu", "--backend", "cupy"), ("--backend cupy", "CUDA")),
    ],
)
def test_a_mistake_is_one_line(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, out, err = place.main("bench-models", *options)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)


def test_a_process_of_torchrun_starts_no_others(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = place.main(*TWO)
    assert status == 2
    assert "one of 2 processes already" in err
