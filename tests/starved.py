"""Networks of `bench-models` that find no memory at a chosen step of a chosen process."""

from dataclasses import dataclass

import pytest
import torch

from sanctl.bench import scaling
from sanctl.bench.network import ModelSettings, RunningNetwork


@dataclass(frozen=True)
class Shortage:
    """Where memory does not suffice.

    Attributes:
        rank: in which process.
        network: of which name.
        instance: whether of the one that all processes run, 0, or of the first's own, 1.
        step: at which of its steps, from 0.
    """

    rank: int
    network: str
    instance: int
    step: int

    def arrange(self, rank: int) -> None:
        """Let it come in this process, if it is that one, until its end."""
        if rank == self.rank:
            starve(self)


def starve(shortage: Shortage) -> None:
    built: list[str] = []

    class Starved(RunningNetwork):
        def __init__(self, name: str, settings: ModelSettings, device: torch.device) -> None:
            super().__init__(name, settings, device)
            self._steps = 0
            self._place = (name, built.count(name))
            built.append(name)

        def step(self) -> None:
            if (*self._place, self._steps) == (shortage.network, shortage.instance, shortage.step):
                torch.empty(1 << 60, dtype=torch.uint8)
            self._steps += 1
            super().step()

    pytest.MonkeyPatch().setattr(scaling, "RunningNetwork", Starved)
