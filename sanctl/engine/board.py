"""What each process of a run did lately, told once a second and beside the training."""

import json
import os
import signal
import threading
import time
from dataclasses import asdict
from types import TracebackType

import torch
from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from sanctl.engine.device import describe_device
from sanctl.engine.gpu import GpuMonitor
from sanctl.engine.store import record_key
from sanctl.engine.team import Team
from sanctl.engine.watch import StepClock
from sanctl.report.records import GpuReading, RankRecord

INTERVAL = 1.0  # seconds


class RankBoard:
    """A context in which every process leaves its record in the store, and rank 0 reads them all.

    A thread does so, so that training waits neither for the network nor for the GPU's driver. That
    the records change is also how a launching process sees that this one is not stopped.

    Args:
        team: the processes of the run.
        device: of this process.
    """

    def __init__(self, team: Team, device: torch.device) -> None:
        self._team = team
        self._device = describe_device(device)
        self._gpu = GpuMonitor(device)
        self._latest = (0, 0.0, 0.0)
        self._news: list[RankRecord] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="rank-board", daemon=True)

    def __enter__(self) -> "RankBoard":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()

    def step_done(self, step: int, clock: StepClock) -> None:
        """Note how far this process is, for its next record."""
        self._latest = (step, clock.own_images_per_s, clock.data_wait)

    def news(self) -> list[RankRecord]:
        """The records of all processes, in rank order; on rank 0, and none where none are new."""
        news, self._news = self._news, None
        return news or []

    def _tell(self) -> None:
        try:
            while not self._end.wait(INTERVAL):
                self._news = self._exchange(self._team.store)
        except DistError:  # who kept the store is gone: the launching process, or rank 0
            os.kill(os.getpid(), signal.SIGTERM)  # save, while the others still answer

    def _exchange(self, store: Store | None) -> list[RankRecord] | None:
        step, images_per_s, data_wait = self._latest
        team = self._team
        own = RankRecord(
            team.rank, team.host, self._device, step, images_per_s, data_wait, self._gpu.read()
        )
        if store is None:
            return [own]
        store.set(record_key(team.rank), json.dumps({"time": time.time(), "record": asdict(own)}))
        keys = [record_key(rank) for rank in range(team.size)]
        if not team.first or not store.check(keys):
            return None
        return [read_record(text) for text in store.multi_get(keys)]


def read_record(text: bytes) -> RankRecord:
    """What a process has left at its `record_key`."""
    values = json.loads(text)["record"]
    gpu = values.pop("gpu")
    return RankRecord(**values, gpu=gpu and GpuReading(**gpu))
