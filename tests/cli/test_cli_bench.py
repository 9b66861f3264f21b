"""`sanctl bench-ops` and `sanctl bench-models`, on tiny settings."""

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Place

from sanctl.bench.cases import OPERATORS
from sanctl_ops import set_backend

OPS = ("bench-ops", "--shape", "layer3", "--dtype", "float32", "--device", "cpu")
MODELS = (
    *("bench-models", "--models", "resnet26", "--reference", "resnet26", "--device", "cpu"),
    *("--size", "32", "--mode", "infer", "--rounds", "2"),
)


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANCTL_OPS_BACKEND", raising=False)
    set_backend("auto")


def read_files(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The JSON file, and the rows of the CSV file, which hold the same."""
    with (folder / "b.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    data = json.loads((folder / "b.json").read_text())
    assert len(rows) == len(data["records"])
    about = {key: value for key, value in data.items() if key != "records"}
    for row, record in zip(rows, data["records"], strict=True):
        assert json.loads(row.pop("settings")) == data["settings"]
        everything = record | about
        assert row.keys() == everything.keys() - {"settings"}
        for key, text in row.items():
            assert text == ("" if everything[key] is None else str(everything[key])), key
    return data, rows


def test_operators_are_measured(place: Place) -> None:
    files = ("--json", "b.json", "--csv", "b.csv")
    done = place.sanctl(*OPS, "--op", "subtraction2,aggregation", "--batch", "2", *files)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert "check, then time: 4/4" in done.stderr
    assert "aggregation, float32, batch 2" in done.stdout
    assert re.search(r"a copy moves [\d.]+ GB/s", done.stdout)
    assert "wrote b.json\nwrote b.csv\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    data, _ = read_files(place.folder)
    assert data["torch"] == torch.__version__
    assert data["device"].startswith("CPU")
    assert {"date", "cupy", "cuda", "sanctl"} <= data.keys()
    assert data["settings"] == {
        "op": ["subtraction2", "aggregation"],
        "dtype": ["float32"],
        "shape": ["layer3"],
        "backend": ["torch"],
        "batch": 2,
        "layout": "contiguous",
    }
    assert len(data["records"]) == 8
    for record in data["records"]:
        assert record["bytes_per_s"] == record["moved_bytes"] / record["median_s"]
        assert record["share_of_copy"] == record["bytes_per_s"] / record["copy_bytes_per_s"]
        assert record["floor_s"] == record["moved_bytes"] / record["copy_bytes_per_s"]
    for unfolded, other in zip(data["records"][::2], data["records"][1::2], strict=True):
        assert (unfolded["backend"], unfolded["speedup_over_unfold"]) == ("unfold", 1)
        assert (other["backend"], other["pass"]) == ("torch", unfolded["pass"])
        assert other["speedup_over_unfold"] == unfolded["median_s"] / other["median_s"]


def test_networks_are_measured(place: Place) -> None:
    done = place.sanctl(
        *("bench-models", "--models", "resnet26", "--models", "san10_pairwise,resnet26"),
        *("--reference", "resnet38", "--device", "cpu", "--size", "32", "--amp"),
        *("--rounds", "2", "--backend", "torch", "--json", "b.json", "--csv", "b.csv"),
    )
    assert done.returncode == 0, done.stderr
    assert "rounds of networks: 9/9" in done.stderr
    assert "note: --amp has no effect on a CPU: running in float32" in done.stderr
    assert "san10_pairwise was not measured: needs images of at least 128 px" in done.stdout
    data, rows = read_files(place.folder)
    reference, resnet, san = data["records"]
    assert [row["network"] for row in rows] == ["resnet38", "resnet26", "san10_pairwise"]
    assert reference["ratio_to_reference"] == 1
    assert resnet["ratio_to_reference"] > 0
    assert resnet["images_per_s"] == 2 / resnet["step_median_s"]
    assert resnet["flop_per_s"] == resnet["images_per_s"] * resnet["flop_per_image"]
    assert san["images_per_s"] is None
    settings = data["settings"]
    assert (settings["mode"], settings["size"], settings["autocast_dtype"]) == (
        "train",
        32,
        "float32",
    )


def test_nothing_is_timed_where_a_result_is_wrong(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OPERATORS["aggregation"]
    broken = dataclasses.replace(right, run=lambda k, x, w: 1.2 * right.run(k, x, w))
    monkeypatch.setitem(OPERATORS, "aggregation", broken)
    status, out, err = place.main(*OPS, "--json", "b.json")
    assert (status, out) == (1, "")
    *_, line = err.splitlines()
    words = ("error: aggregation, layer3, float32", "forward", "backend torch", "float64")
    assert all(word in line for word in words)
    assert not (place.folder / "b.json").exists()


def test_a_baseline_that_needs_too_much_memory_is_not_available(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OPERATORS["subtraction"]

    def needs_too_much(k: int, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:  # which is the check's
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right.unfold(k, x)

    short = dataclasses.replace(right, unfold=needs_too_much)
    monkeypatch.setitem(OPERATORS, "subtraction", short)
    status, out, _ = place.main(*OPS, "--op", "subtraction", "--json", "b.json")
    assert status == 0
    unfolded = [line.split() for line in out.splitlines() if " unfold " in line][:2]
    assert [cells[:4] for cells in unfolded] == [
        ["layer3", direction, "unfold", "n/a"] for direction in ("fwd", "bwd")
    ]
    records = json.loads((place.folder / "b.json").read_text())["records"]
    assert [record["median_s"] is None for record in records] == [True, False] * 2
    assert {record["speedup_over_unfold"] for record in records} == {None}


def test_no_network_that_runs_is_a_failure(place: Place) -> None:
    status, out, err = place.main(
        *("bench-models", "--models", "san10_pairwise", "--reference", "san10_pairwise"),
        *("--size", "64", "--device", "cpu"),
    )
    assert status == 1
    assert "needs images of at least 128 px" in out
    assert err.splitlines()[-1] == "error: none of the networks could be measured"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*OPS, "--op", "agregation"), ("--op agregation", "did you mean aggregation")),
        ((*OPS, "--dtype", "float32,int8"), ("--dtype int8", "bfloat16")),
        ((*OPS, "--shape", "layer9"), ("--shape layer9", "layer3")),
        ((*OPS, "--layout", "nhwc"), ("--layout nhwc", "channels_last")),
        ((*OPS, "--backend", "cuda"), ("--backend cuda", "torch, cupy")),
        ((*OPS, "--backend", "cupy"), ("--backend cupy", "CUDA device")),
        ((*OPS, "--batch", "0"), ("--batch", "sanctl bench-ops --help")),
        ((*OPS, "--device", "tpu"), ("--device tpu",)),
        ((*OPS, "--json", "a_file/b.json"), ("a_file/b.json", "no folder")),
        ((*OPS, "--csv", "config"), ("config", "is a folder")),
        ((*MODELS, "--models", "resnet27"), ("--models resnet27", "resnet26")),
        ((*MODELS, "--reference", "resnet51"), ("--reference resnet51", "resnet50")),
        ((*MODELS, "--models", "resnet27:eager"), ("--models resnet27", "resnet26")),
        ((*MODELS, "--reference", "resnet26:"), ("--reference resnet26:", "use eager, compiled")),
        ((*MODELS, "--models", "resnet26:fast"), ("resnet26: fast", "use eager, compiled")),
        ((*MODELS, "--mode", "train,infer"), ("--mode train,infer", "train")),
        ((*MODELS, "--backend", "cupy"), ("--backend cupy", "CUDA device")),
        ((*MODELS, "--backend", "numpy"), ("--backend numpy", "cupy")),
        ((*MODELS, "--rounds", "0"), ("--rounds", "sanctl bench-models --help")),
        ((*MODELS, "--csv", "a_file/b.csv"), ("a_file/b.csv", "no folder")),
    ],
)
def test_a_mistake_is_one_line(
    place: Place, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (place.folder / "a_file").touch()
    status, out, err = place.main(*arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)


def test_a_disk_that_is_full_is_one_line(place: Place) -> None:
    done = place.sanctl(*OPS, "--op", "subtraction", "--json", "b.json", largest_file=100)
    assert done.returncode == 1
    assert "cannot write b.json" in done.stderr.splitlines()[-1]
    assert not (place.folder / "b.json").exists()


def test_the_variable_is_refused_or_overruled(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANCTL_OPS_BACKEND", "cupy")
    monkeypatch.setattr("sanctl_ops.backend._requested", None)
    status, out, err = place.main(*MODELS)
    assert (status, out) == (2, "")
    assert err.startswith("error: the cupy backend cannot run")
    assert place.sanctl(*MODELS, "--backend", "auto").returncode == 0
