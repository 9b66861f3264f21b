import argparse
import io
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sanctl.config.schema import TrainConfig
from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.engine.device import Precision
from sanctl.engine.optim import build_ema
from sanctl.engine.state import TrainState, load_weights
from sanctl.errors import UserError

WEIGHTS = {"module.conv.weight": torch.arange(6.0).view(2, 3), "module.conv.bias": torch.ones(2)}


def legacy(content: object) -> bytes:
    """The file format of torch before 1.6: pickles, no zip archive."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def modern(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert "weights_only" not in message  # torch's advice is to run the file's code
    return message


def test_everything_survives_a_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    train = TrainConfig(model="resnet26", optimizer="adamw", ema_decay=0.9)
    state = TrainState(model, train, Precision("cpu"))
    model(torch.randn(2, 1, 3, 3)).sum().backward()
    state.optimizer.step()
    assert state.ema is not None
    state.ema.update_parameters(model)
    state.finish_epoch(12.5)
    state.step, state.metrics = 3, {"counts": torch.tensor([1, 2, 3])}
    saved = state.checkpoint()
    saved.scores = {"epoch": 1, "top1_val": 12.5}
    saved.config = {"DATA": {"classes": 2, "mean": [0.5], "channels": None}}
    saved.classes, saved.dataset, saved.name = ["a", "ü"], "data", "net"
    path = tmp_path / "model" / "x.pth"
    saved.save(path)
    loaded = load_checkpoint(path)

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.tolist()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    assert plain(vars(loaded)) == plain(vars(saved))
    assert (loaded.epoch, loaded.step, loaded.best_epoch, loaded.best_score) == (2, 3, 1, 12.5)
    assert list(path.parent.iterdir()) == [path]


def test_a_restored_state_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    def make() -> TrainState:
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        return TrainState(model, TrainConfig(model="resnet26", ema_decay=0.5), Precision("cpu"))

    def advance(state: TrainState) -> None:
        assert state.ema is not None
        for _ in range(3):
            state.model(torch.randn(2, 1, 3, 3)).square().sum().backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.ema.update_parameters(state.model)

    torch.manual_seed(0)
    first = make()
    advance(first)
    path = tmp_path / "x.pth"
    first.checkpoint().save(path)
    advance(first)
    torch.manual_seed(99)
    second = make()
    second.restore(load_checkpoint(path), path)
    advance(second)
    assert first.ema is not None
    assert second.ema is not None
    for ours, theirs in ((first.model, second.model), (first.ema, second.ema)):
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_average_is_what_is_tested(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    ema = build_ema(model, 0.5)
    assert ema is not None
    ema.update_parameters(model)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    nn.init.zeros_(model.weight)
    assert torch.equal(Checkpoint(model.state_dict()).weights()["weight"], torch.zeros(2, 2))
    Checkpoint(model.state_dict(), ema=ema.state_dict()).save(tmp_path / "x.pth")
    found = load_checkpoint(tmp_path / "x.pth").weights()
    assert found.keys() == average.keys()
    assert all(torch.equal(found[key], average[key]) for key in average)


NUMPY = [np.float64(77.1), np.float32(1.5), np.float16(1), np.int64(3), np.int32(3), np.bool_(True)]


@pytest.mark.parametrize("write", [legacy, modern])
def test_the_published_format_loads(tmp_path: Path, write: Callable[[object], bytes]) -> None:
    path = tmp_path / "x.pth"
    content = {"state_dict": WEIGHTS, "epoch": 100, "arch": "san", "best": NUMPY, "top1": NUMPY[0]}
    path.write_bytes(write(content))
    loaded = load_checkpoint(path)
    assert loaded.epoch == 100
    assert loaded.state_dict.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded.state_dict[key], WEIGHTS[key]) for key in WEIGHTS)
    assert (loaded.config, loaded.classes, loaded.step) == (None, None, None)


def test_scalars_of_numpy_1_load_as_well(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    content = legacy({"state_dict": WEIGHTS, "epoch": np.int64(5), "best": np.float64(77.1)})
    assert b"numpy._core.multiarray" in content
    # numpy 1 had its core without the underscore, and wrote that into its pickles.
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_checkpoint(path).epoch == 5


@pytest.mark.parametrize("write", [legacy, modern])
def test_bare_weights_load(tmp_path: Path, write: Callable[[object], bytes]) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(write(WEIGHTS))
    assert load_checkpoint(path).state_dict.keys() == WEIGHTS.keys()


def test_what_other_programs_keep_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    beside = {"classes": 1000, "config": "a.yaml", "metrics": 0.7, "ema": True, "epoch": "last"}
    path.write_bytes(modern({"state_dict": WEIGHTS, **beside}))
    loaded = load_checkpoint(path)
    assert (loaded.epoch, loaded.classes, loaded.config, loaded.ema) == (0, None, None, None)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such checkpoint" in refusal(tmp_path / "x.pth")


def test_a_folder(tmp_path: Path) -> None:
    assert "folder" in refusal(tmp_path)


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be read" in refusal(tmp_path / "file" / "x.pth")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"# a: b\n", b"TRAIN:\n  epochs: 3\n", b"\x89PNG\r\n\x1a\n" + bytes(300)],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert "not a checkpoint" in refusal(path)


@pytest.mark.parametrize("write", [legacy, modern])
@pytest.mark.parametrize("share", [0.003, 0.02, 0.2, 0.5, 0.9, 0.999])
def test_a_file_cut_short(tmp_path: Path, write: Callable[[object], bytes], share: float) -> None:
    path = tmp_path / "x.pth"
    whole = write({"state_dict": {"a": torch.randn(500)}, "epoch": 3})
    path.write_bytes(whole[: int(len(whole) * share)])
    refusal(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "list"),
        (torch.ones(2), "Tensor"),
        ({}, "no weights"),
        ({"state_dict": {}}, "no weights"),
        ({"state_dict": [1]}, "no weights"),
        ({"state_dict": {"a": 1.0}}, "more than tensors"),
        ({"epoch": 3, "model": WEIGHTS}, "more than tensors"),
        ({"state_dict": WEIGHTS, "format": 99}, "format 99"),
    ],
)
def test_contents_that_are_no_checkpoint(tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path)
    assert reason in refusal(path)


class Hostile:
    """Runs a command when it is unpickled in the ordinary way."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@pytest.mark.parametrize("write", [legacy, modern, pickle.dumps, lambda c: pickle.dumps(c, 2)])
@pytest.mark.parametrize("function", [os.system, subprocess.check_call, eval, exec])
def test_hostile_pickles_are_refused_and_not_executed(
    tmp_path: Path, write: Callable[[object], bytes], function: Callable[..., Any]
) -> None:
    marker = tmp_path / "marker"
    argument: Any = {
        os.system: f"touch {marker}",
        subprocess.check_call: ["touch", str(marker)],
    }.get(function, f"open({str(marker)!r}, 'w')")
    path = tmp_path / "x.pth"
    content = {"state_dict": WEIGHTS, "epoch": Hostile(function, argument)}
    path.write_bytes(write(content))
    message = refusal(path)
    assert not marker.exists()
    if write in (legacy, modern):
        assert "refused" in message
        assert function.__name__ in message


def test_harmless_objects_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1)}, path)
    assert "argparse.Namespace" in refusal(path)


def test_another_network_is_told_by_its_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    weights = {"module.0.weight": torch.zeros(5, 3), "module.1.bias": torch.zeros(2)}
    with pytest.raises(UserError) as caught:
        load_weights(model, weights, tmp_path / "x.pth")
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "x.pth"))
    for part in ("0.bias", "1.bias", "0.weight 5x3 instead of 2x3"):
        assert part in message


def test_the_optimiser_of_another_kind_is_one_line(tmp_path: Path) -> None:
    def state(optimizer: str) -> TrainState:
        train = TrainConfig(model="resnet26", optimizer=optimizer)  # type: ignore[arg-type]
        made = TrainState(nn.Linear(2, 2), train, Precision("cpu"))
        made.model(torch.ones(1, 2)).sum().backward()
        made.optimizer.step()
        return made

    for ours, theirs in (("sgd", "adamw"), ("adamw", "sgd")):
        with pytest.raises(UserError, match=r"x\.pth.*TRAIN\.optimizer") as caught:
            state(ours).restore(state(theirs).checkpoint(), Path("x.pth"))
        assert "\n" not in str(caught.value)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from sanctl.engine.checkpoint import Checkpoint
from sanctl.errors import SanctlError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails with EFBIG
path = Path(sys.argv[1])
Checkpoint({"a": torch.ones(1000)}, epoch=1).save(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    Checkpoint({"a": torch.ones(100_000)}, epoch=2).save(path)
except SanctlError as error:
    print(error, end="")
    sys.exit(error.exit_status)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on file sizes")
@pytest.mark.parametrize("room", [100, 300_000])
def test_a_disk_that_fills_up_while_saving(tmp_path: Path, room: int) -> None:
    path = tmp_path / "x.pth"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(room)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"cannot write {path}")
    assert "the previous file is intact" in done.stdout
    assert "\n" not in done.stdout
    assert load_checkpoint(path).epoch == 1
    assert list(tmp_path.iterdir()) == [path]
