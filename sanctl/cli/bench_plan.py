"""What `sanctl bench-models` measures, and what it shows, in one process or in several."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sanctl.bench.models import ModelRecord
    from sanctl.bench.network import ModelSettings
    from sanctl.bench.scaling import ScalingRecord


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        names: Networks.
        reference: The one of them that the others are compared with.
        settings: How they are run.
        rounds: Turns of every network.
        backend: What runs the operators.
    """

    names: list[str]
    reference: str
    settings: "ModelSettings"
    rounds: int
    backend: str

    @property
    def turns(self) -> int:
        """How often a network has its turn, that in which it is warmed up included."""
        return len(self.names) * (self.rounds + 1)


@dataclass(frozen=True)
class Outcome:
    """What was measured, and how it is shown.

    Attributes:
        records: Of each network.
        device: What computed, as a person would name it.
        columns, rows: Of the table.
        where: What follows "batch 64" in the table's title.
        legend: What the columns mean.
    """

    records: "Sequence[ModelRecord] | Sequence[ScalingRecord]"
    device: str
    columns: tuple[str, ...]
    rows: list[list[str | None]]
    where: str
    legend: str
