"""The processes that train one network together, and what they say to each other.

The communication is torch.distributed's: NCCL or gloo for gradients and sums, gloo for votes.
"""

import json
import socket
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store, Work
from torch.nn.parallel import DistributedDataParallel

from sanctl.data.sampler import Share
from sanctl.engine.remarks import overlook_remarks
from sanctl.engine.store import done_key
from sanctl.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(seconds=30)


class Team:
    """This process alone, or its place in a team without anything to say to the others.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_size: how many of them run on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.local_size = local_size
        self.host = socket.gethostname()

    @property
    def first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Which images of every batch are this process's."""
        return Share(self.rank, self.size)

    @property
    def store(self) -> Store | None:
        """Where the processes leave short notes for each other."""
        return None

    def replicate(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The network to train: one whose gradients are the mean over the processes."""
        return model

    def unsynchronised(self, replica: Any) -> AbstractContextManager[None]:
        """A context in which the gradients of a replica stay this process's own, and add up."""
        return nullcontext()

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over the processes."""

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of rank 0: the statistics of batch normalisation."""

    def first_says(self, key: str, value: T) -> T:
        """Rank 0's value, a plain one, on every process; a key serves once."""
        return value

    def gather(self, value: T) -> list[T]:
        """The plain values of all processes, in rank order; every one of them has to ask."""
        return [value]

    def require_same(self, what: str, value: Any) -> None:
        """Make sure that every process has found the same plain value.

        Raises:
            UserError: this process has found another than rank 0.
        """
        theirs = self.first_says(f"same/{what}", value)
        if theirs != value:
            raise UserError(
                f"process {self.rank} on {self.host} finds another value than process 0 for "
                f"{what}: {value}, not {theirs}; all machines must see the same folders"
            )

    def agree(self, number: int, at_once: bool = False) -> int:
        """Take a vote.

        Args:
            number: this process's.
            at_once: wait for the others, instead of hearing of it at the next vote.

        Returns:
            The largest number of any process: of this vote if `at_once`, else of the one before,
            so that no process waits for another. The same on every process.
        """
        return number


ALONE = Team()


class ProcessTeam(Team):
    """A process in a process group.

    Args:
        place: which process of how many.
        store: for notes and for the rendezvous of the group.
        backend: "nccl" or "gloo".
        timeout: after which a process that does not answer is an error. The group itself waits a
            little longer, so that a launching process can tell which one it is.
    """

    def __init__(self, place: Team, store: Store, backend: str, timeout: timedelta) -> None:
        super().__init__(place.rank, place.size, place.local_size)
        overlook_remarks()
        self._store = store
        timeout += _PATIENCE
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=self.rank,
            world_size=self.size,
            timeout=timeout,
        )
        # Votes of their own group never wait for a GPU.
        voters = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(voters, ProcessGroup)
        self._voters = voters
        self._ballot = torch.zeros((), dtype=torch.int64)
        self._vote: Work | None = None
        self._gathered = 0

    @property
    def store(self) -> Store:
        """Where the processes leave short notes for each other."""
        return self._store

    def replicate(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The network to train: one whose gradients are the mean over the processes.

        Buffers are not exchanged at every step, as they are by default: in training, batch
        normalisation does not read them, so `share_buffers` before an evaluation does the same.
        """
        with warnings.catch_warnings():
            # The name that replaces `broadcast_buffers` is newer than the oldest torch supported.
            warnings.simplefilter("ignore", FutureWarning)
            # A static graph is no faster, eager or compiled: ops/NOTES.md, "The host".
            return DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def unsynchronised(self, replica: Any) -> AbstractContextManager[None]:
        """A context in which the gradients of a replica stay this process's own, and add up."""
        return replica.no_sync()

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over the processes."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of rank 0: the statistics of batch normalisation."""
        _broadcast(model.buffers())

    def first_says(self, key: str, value: T) -> T:
        """Rank 0's value, a plain one, on every process; a key serves once."""
        if self.first:
            self._store.set(key, json.dumps(value))
            return value
        return json.loads(self._store.get(key))

    def gather(self, value: T) -> list[T]:
        """The plain values of all processes, in rank order; every one of them has to ask."""
        self._gathered += 1
        self._store.set(f"gather/{self._gathered}/{self.rank}", json.dumps(value))
        keys = (f"gather/{self._gathered}/{rank}" for rank in range(self.size))
        return [json.loads(self._store.get(key)) for key in keys]

    def agree(self, number: int, at_once: bool = False) -> int:
        """Take a vote; see `Team.agree`."""
        decided = self._outcome()
        if not decided:
            self._ballot = torch.tensor(number)
            self._vote = dist.all_reduce(
                self._ballot, dist.ReduceOp.MAX, group=self._voters, async_op=True
            )
            if at_once:
                decided = self._outcome()
        return decided

    def leave(self) -> None:
        """Wait until every process is done, and end the group."""
        self._outcome()
        dist.barrier(self._voters)
        dist.destroy_process_group()
        with suppress(dist.DistError):  # who kept the store may have left by now
            self._store.set(done_key(self.rank), "")

    def _outcome(self) -> int:
        if self._vote is None:
            return 0
        self._vote.wait()
        self._vote = None
        return int(self._ballot)


def _broadcast(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
