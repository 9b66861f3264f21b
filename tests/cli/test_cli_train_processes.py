"""`sanctl train` with several processes, as it is typed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from team_run import free_port
from tiny_run import Place, environment

from sanctl.engine.checkpoint import load_checkpoint

LONG = ("-o", "TRAIN.batch_size=2", "-o", "TRAIN.print_freq=1", "-o", "TRAIN.workers=2",
        "-o", "TRAIN.epochs=400")  # fmt: skip
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class Command:
    """`sanctl train shapes tiny --no-test` in a session of its own; its output goes to files."""

    def __init__(self, place: Place, *arguments: str, **variables: str) -> None:
        Command.count += 1
        self.out = place.folder / f"out_{Command.count}.txt"
        self._err = place.folder / f"err_{Command.count}.txt"
        self.place = place
        with self.out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sanctl", "train", "shapes", "tiny", "--no-test",
                 "--device", "cpu", *arguments],
                cwd=place.folder,
                env=environment() | variables,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )  # fmt: skip

    count = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.out.read_text():
            assert self._process.poll() is None, self.errors()
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Its status and errors, once it and all its processes are gone."""
        try:
            status = self._process.wait(120)
            deadline = time.monotonic() + 30
            while session(self.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not session(self.pid)
        finally:
            for pid in session(self.pid):
                os.kill(pid, signal.SIGKILL)
        return status, self.errors()

    def errors(self) -> str:
        return self._err.read_text()


def children(parent: int) -> list[int]:
    """The processes that a process has started, in the order of their start."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return sorted(int(word) for word in text.split())


def session(leader: int) -> list[int]:
    """The processes of a session that are left."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has gone meanwhile
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def test_sigterm_to_every_process_saves_and_one_process_goes_on(place: Place) -> None:
    """As a scheduler sends it: to the launching process, its processes and their data workers."""
    command = Command(place, *LONG, "--nproc", "2")
    command.wait_for("train epoch=2 epochs=400 step=3 ")
    os.killpg(command.pid, signal.SIGTERM)
    status, err = command.end()
    assert status == 128 + signal.SIGTERM, err
    (line,) = err.splitlines()
    assert re.match(r"interrupted after epoch \d+, step \d+; saved ", line)
    expected = f"sanctl train shapes tiny {' '.join(LONG)} --device cpu --nproc 2 --resume auto"
    assert line.endswith(f"; go on with: {expected}")
    saved = place.folder / line.split("saved ")[1].split(";")[0]
    checkpoint = load_checkpoint(saved)
    assert checkpoint.step is not None
    rest = ("-o", f"TRAIN.epochs={checkpoint.epoch}", *LONG[:4], "--resume", "auto", "--no-test")
    status, out, err = place.main("train", "shapes", "tiny", *rest)
    assert (status, err) == (0, "")
    assert f"train epoch={checkpoint.epoch} epochs={checkpoint.epoch} step=9 " in out
    assert f" step={checkpoint.step} " not in out
    table = pd.read_csv(place.run / "metrics.csv")
    assert table.epoch.tolist() == list(range(1, checkpoint.epoch + 1))


def test_a_killed_process_is_started_again_from_the_last_checkpoint(place: Place) -> None:
    command = Command(place, *LONG, "--nproc", "2", "--max-restarts", "1")
    command.wait_for("train epoch=2 epochs=400 step=3 ")
    server = next(pid for pid in children(command.pid) if children(pid))
    os.kill(children(server)[1], signal.SIGKILL)
    command.wait_for("note a process failed: started again")
    command.wait_for("train epoch=3 epochs=400 step=3 ")
    os.kill(command.pid, signal.SIGTERM)
    status, err = command.end()
    assert status == 143, err
    first = re.findall(r" first_epoch=(\d+) ", command.out.read_text())
    assert first[0] == "1"
    assert int(first[1]) >= 2
    epochs = pd.read_csv(place.run / "metrics.csv").epoch.tolist()
    assert epochs == list(range(1, len(epochs) + 1))


def test_two_machines_meet_and_stop_together(place: Place) -> None:
    endpoint = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    machines = [Command(place, *LONG, *endpoint, "--node-rank", str(rank)) for rank in (1, 0)]
    machines[1].wait_for("train epoch=1 epochs=400 step=3 ")
    os.kill(machines[0].pid, signal.SIGINT)
    (other_status, other_err), (status, err) = [machine.end() for machine in machines]
    assert (other_status, status) == (130, 143), err
    for text in (err, other_err):
        (line,) = text.splitlines()
        assert line.startswith("interrupted after epoch ")
    assert machines[0].out.read_text() == ""  # machine 0 reports
    assert 'device="2 processes' in machines[1].out.read_text()
    newest = max(place.model.glob("train_epoch_*.pth"), key=lambda path: path.stat().st_mtime)
    assert str(Path("exp", "shapes", "tiny", "model", newest.name)) in err  # what it says it saved
    assert load_checkpoint(newest).epoch


def test_processes_that_torchrun_has_started_join(place: Place) -> None:
    """With variables as torchrun sets them."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    local = {"LOCAL_WORLD_SIZE": "2"}
    processes = [Command(place, "-o", "TRAIN.epochs=1", **meeting, **local, **at) for at in places]
    (first_status, first_err), (status, err) = [process.end() for process in processes]
    assert (first_status, status, first_err, err) == (0, 0, "", "")
    assert "epoch epoch=1 " in processes[0].out.read_text()
    assert processes[1].out.read_text() == ""
    assert (place.model / "train_epoch_1.pth").exists()


def test_processes_outlive_their_launcher_by_a_checkpoint(place: Place) -> None:
    seldom = ("-o", "TRAIN.save_freq=1000")  # what is saved is saved for this reason
    command = Command(place, *LONG, *seldom, "--nproc", "2")
    command.wait_for("train epoch=1 epochs=400 step=3 ")
    os.kill(command.pid, signal.SIGKILL)
    status, _ = command.end()
    assert status == -signal.SIGKILL
    (saved,) = place.model.glob("train_epoch_*.pth")  # of the middle of an epoch or of its end
    assert load_checkpoint(saved).epoch >= 1


@NO_GPU
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--nproc 2 --device cuda", ("--nproc 2", "0 GPUs", "--device cpu")),
        ("--gpus 0,1", ("--gpus 0,1", "0 GPUs")),
        ("--gpus 0,x", ("--gpus 0,x", "as 0,1")),
        ("--gpus 0,0", ("--gpus 0,0", "different")),
        ("--gpus 0 --device cpu", ("--gpus 0", "--device cpu")),
        ("--nproc 2 --device cuda:0", ("--device cuda:0",)),
        ("--nproc 5 --device cpu", ("TRAIN.batch_size 4", "5 processes")),
        ("--nproc 0", ("--nproc",)),
        ("--nnodes 2 --node-rank 2", ("--node-rank 2", "the last is 1")),
        ("--node-rank 1", ("--node-rank 1", "of 1 machines")),
        ("--nnodes 2 --rdzv-endpoint here", ("--rdzv-endpoint here", "HOST:PORT")),
        ("--nnodes 2 -o Distributed.dist_url=env://", ("Distributed.dist_url env://",)),
        ("-o Distributed.world_size=-1", ("Distributed.world_size", "--nnodes")),
        ("-o Distributed.timeout_minutes=0", ("Distributed.timeout_minutes",)),
        ("--max-restarts x", ("--max-restarts", "x")),
    ],
)
def test_nonsense_is_one_line(place: Place, options: str, words: tuple[str, ...]) -> None:
    status, out, err = place.main("train", "shapes", "tiny", *options.split())
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not place.run.exists()


def test_torchrun_and_the_own_launcher_exclude_each_other(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = place.main("train", "shapes", "tiny", "--nproc", "2")
    assert status == 2
    assert "torchrun" in err


def test_a_dry_run_of_several_processes(place: Place) -> None:
    status, out, err = place.main(
        "train", "shapes", "tiny", "--dry-run", "--nproc", "3", "--device", "cpu"
    )
    assert (status, err) == (0, "")
    assert re.search(r"device +3 processes, the first on CPU", out)
    assert not place.run.exists()


def test_what_every_process_finds_is_told_once(place: Place) -> None:
    status, _, err = place.main(
        "train", "shapes", "tiny", "--nproc", "2", "--device", "cpu", "-o", "TRAIN.sync_bn=true"
    )
    assert status == 2
    assert re.fullmatch(r"error: TRAIN\.sync_bn: [^\n]*\n", err)
