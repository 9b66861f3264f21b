"""Runs in processes of their own, one or several each, that are killed or go through to the end."""

import multiprocessing
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_run import FilesOnly

from sanctl.config.load import load_config
from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.fit import fit
from sanctl.engine.membership import LAUNCHED, Membership, joined
from sanctl.engine.run import Run, open_run
from sanctl.engine.team import ALONE, Team
from sanctl.report.records import StepRecord
from sanctl.report.reporter import Reporter

EVERYTHING = (
    "TRAIN.save_every_steps=2",
    "TRAIN.mixup_alpha=0.4",
    "TRAIN.ema_decay=0.7",
    "TRAIN.clip_grad=1",
    "TRAIN.optimizer=adamw",
    "TRAIN.base_lr=0.01",
    "TRAIN.warmup_epochs=1",
)
STEPS = 3 * (5 + 3)  # of training and evaluation in a run of tiny_run.CONFIG
_PATIENCE = 100  # s


class Death(NamedTuple):
    """When all processes of a run are killed: some seconds after that many steps."""

    steps: int
    delay: float


class Task(NamedTuple):
    """A run: its configuration, how many processes it has, where they meet, and when they die."""

    config: Path
    keys: tuple[str, ...]
    processes: int
    port: int
    death: Death | None


def run_to_its_end(task: Task) -> int:
    """Start the run, or go on with it; returns 0, or minus the signal that killed it."""
    context = multiprocessing.get_context("forkserver")  # imports once for all processes
    context.set_forkserver_preload(["killed_run", "sanctl.report.create"])
    process = context.Process(target=_lead, args=(task,))
    process.start()
    process.join(_PATIENCE)
    if process.exitcode is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        raise TimeoutError(f"the run hangs: {task}")
    return process.exitcode


def _lead(task: Task) -> None:
    """Become a process group with the other processes of the run."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)
    os.environ.pop(LAUNCHED, None)  # where the server was started by a test of the launcher
    torch.set_num_threads(1)
    if task.processes == 1:
        _train(task, ALONE)
        return
    others = [os.fork() or _follow(task, rank) for rank in range(1, task.processes)]
    _join(task, 0)
    if any(os.waitpid(pid, 0)[1] for pid in others):
        sys.exit(1)


def _follow(task: Task, rank: int) -> int:
    status = 1
    try:
        _join(task, rank)
        status = 0
    finally:
        os._exit(status)


def _join(task: Task, rank: int) -> None:
    size = task.processes
    member = Membership(rank, size, rank, size, "127.0.0.1", task.port, serves=rank == 0)
    with joined(member, "gloo", timedelta(seconds=_PATIENCE)) as (team, stop):
        _train(task, team, stop)


def _train(task: Task, team: Team, stop: object = None) -> None:
    loaded = load_config(task.config, [*task.keys])
    run = open_run(loaded, device="cpu", resume="auto", team=team)
    fit(run, _Dying(run, task.death) if team.first else Reporter(), stop)  # type: ignore[arg-type]


class _Dying(FilesOnly):
    """Writes metrics.csv, and has the process group killed at its time."""

    def __init__(self, run: Run, death: Death | None) -> None:
        super().__init__(run, self._on_step)
        self._death = death
        self._seen = 0

    def _on_step(self, record: StepRecord, training: bool) -> None:
        self._seen += 1
        if self._death is not None and self._seen == self._death.steps:
            threading.Timer(self._death.delay, os.killpg, (0, signal.SIGKILL)).start()


def outcome(folder: Path) -> dict[str, object]:
    """What a run has left: its checkpoints value by value, and metrics.csv as bytes."""
    left: dict[str, object] = {"metrics.csv": (folder / "metrics.csv").read_bytes()}
    for path in sorted((folder / "model").glob("*.pth")):
        content = vars(load_checkpoint(path))
        content["config"]["TRAIN"].pop("save_path")
        left |= flat(content, path.name)
    return left


def flat(value: object, name: str = "") -> dict[str, object]:
    """A checkpoint's values by their places in it, tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
    if isinstance(value, dict):
        return {
            place: leaf
            for key, item in value.items()
            for place, leaf in flat(item, f"{name}.{key}").items()
        }
    return {name: value}
