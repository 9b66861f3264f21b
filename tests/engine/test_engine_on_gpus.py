"""`sanctl train` and `sanctl test` on real GPUs, as they are typed."""

import signal
import subprocess
import time
from contextlib import AbstractContextManager

import pandas as pd
import pytest
import torch
from process_session import python
from team_run import free_port
from tiny_run import Place, environment

from sanctl.engine.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
EXACT = ("TRAIN.deterministic=true", "TRAIN.workers=2")
# At a higher rate, or with two images in the last batch to normalise, what rounding changes grows
# to per cents within an epoch.
GENTLE = ("TRAIN.epochs=1", "TRAIN.base_lr=0.0001", "TRAIN.batch_size=6")


def start(
    place: Place, command: str, *keys: str, exp: str
) -> AbstractContextManager["subprocess.Popen[str]"]:
    options = [part for key in (*keys, f"TRAIN.save_path=exp/{exp}") for part in ("-o", key)]
    arguments = "-m", "sanctl", *command.split(), *options
    return python(*arguments, folder=place.folder, variables=environment())


def run(place: Place, command: str, *keys: str, exp: str) -> str:
    with start(place, command, *keys, exp=exp) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def metrics(place: Place, exp: str) -> pd.DataFrame:
    return pd.read_csv(place.folder / "exp" / exp / "metrics.csv")


def test_a_run_that_was_stopped_ends_as_one_that_was_not(place: Place) -> None:
    keys = (*EXACT, "TRAIN.epochs=40", "TRAIN.save_every_steps=1", "TRAIN.ema_decay=0.9")
    train = "train shapes tiny --no-test --gpus 0"
    run(place, train, *keys, exp="whole")
    table = place.folder / "exp" / "stopped" / "metrics.csv"
    deadline = time.monotonic() + 120
    with start(place, train, *keys, exp="stopped") as stopped:
        while not table.exists() or len(table.read_text().splitlines()) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stopped.send_signal(signal.SIGTERM)
        stopped.communicate(timeout=120)
    assert stopped.returncode == 143
    run(place, f"{train} --resume auto", *keys, exp="stopped")
    assert table.read_bytes() == (place.folder / "exp" / "whole" / "metrics.csv").read_bytes()
    whole, again = (
        load_checkpoint(place.folder / "exp" / exp / "model" / "train_epoch_40.pth")
        for exp in ("whole", "stopped")
    )
    for state in ("state_dict", "ema"):
        expected, actual = getattr(whole, state), getattr(again, state)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(value, actual[key]) for key, value in expected.items())


def test_a_compiled_run_gives_what_one_that_is_not_does(place: Place) -> None:
    """Compiled networks are launched as CUDA graphs, also between evaluations."""
    train = "train shapes tiny --no-test --gpus 0"
    for exp, switch in (("eager", "false"), ("compiled", "true")):
        run(place, train, *EXACT, *GENTLE, f"TRAIN.compile={switch}", exp=exp)
    eager, compiled = metrics(place, "eager"), metrics(place, "compiled")
    pd.testing.assert_frame_equal(eager, compiled, rtol=1e-3, atol=1e-4)


def test_a_compiled_run_on_two_machines_gives_what_one_that_is_not_does(place: Place) -> None:
    """Both are on one GPU: gloo takes that, NCCL would not.

    A batch is all images, so that every step is one of the graphs. Learning changes the last loss
    by 7e-3 of it, rounding by up to 7e-4.
    """
    large = ("TRAIN.batch_size=18", "TRAIN.epochs=6", "TRAIN.base_lr=0.0001")
    keys = (*EXACT, *large, "Distributed.dist_backend=gloo")
    for exp, switch in (("eager", "false"), ("compiled", "true")):
        meeting = f"--nnodes 2 --rdzv-endpoint 127.0.0.1:{free_port()}"
        train = f"train shapes tiny --no-test --gpus 0 {meeting}"
        same = (*keys, f"TRAIN.compile={switch}")
        with (
            start(place, f"{train} --node-rank 0", *same, exp=exp) as first,
            start(place, f"{train} --node-rank 1", *same, exp=exp) as second,
        ):
            for machine in (first, second):
                _, err = machine.communicate(timeout=300)
                assert machine.returncode == 0, err
    eager, compiled = (metrics(place, exp).filter(like="loss") for exp in ("eager", "compiled"))
    assert len(eager) == 6
    pd.testing.assert_frame_equal(eager, compiled, rtol=2e-3)


@two_gpus
def test_two_gpus_train_as_one_where_they_normalise_together(place: Place) -> None:
    for exp, gpus in (("one", "0"), ("two", "0,1")):
        keys = (*EXACT, "TRAIN.sync_bn=true", *GENTLE)
        run(place, f"train shapes tiny --no-test --gpus {gpus}", *keys, exp=exp)
    one, two = metrics(place, "one"), metrics(place, "two")
    assert list(one.columns) == list(two.columns)
    pd.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-5)


@two_gpus
@pytest.mark.parametrize(
    "keys",
    [
        ("TRAIN.amp=true", "TRAIN.channels_last=true"),
        ("TRAIN.amp=true", "TRAIN.compile=true"),
        ("TRAIN.accumulate=2", "TRAIN.ema_decay=0.9", "TRAIN.clip_grad=1"),
    ],
    ids=["amp", "compiled", "accumulated"],
)
def test_two_gpus_train_in_each_way(place: Place, keys: tuple[str, ...]) -> None:
    run(place, "train shapes tiny --no-test --gpus 0,1", *keys, exp="two")
    table = metrics(place, "two")
    assert len(table) == 3
    assert table.filter(like="loss").notna().all().all()
