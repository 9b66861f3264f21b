"""Divergence: a loss, gradient or weight that is not finite, how it is seen, and what follows."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sanctl.engine.resume import find_start
from sanctl.engine.run import Run
from sanctl.engine.steps import StepResult
from sanctl.errors import SanctlError
from sanctl.report.console import printable
from sanctl.report.reporter import Reporter

FILE = "diverged_batch.txt"


class TakenStep(NamedTuple):
    """A training step: its epoch and number, from 1, and the numbers of this process's images."""

    epoch: int
    step: int
    lr: float
    images: Tensor


class DivergedError(SanctlError):
    """Training has left the finite numbers; all processes raise it for the same step."""

    def __init__(self, what: str, taken: TakenStep) -> None:
        super().__init__(
            f"{what} at epoch {taken.epoch}, step {taken.step}, learning rate {taken.lr:g}"
        )
        self.taken = taken


class _Pending(NamedTuple):
    taken: TakenStep
    values: Tensor  # the loss and the norm of the gradient
    ready: torch.cuda.Event | None


class DivergenceWatch:
    """Reads losses and gradients' norms off the device, and raises at the first not finite.

    Both are of the whole batch, so that what is not finite in one process is so in all of them. On
    a GPU they are read while the next step is under way, so that the host never waits for the
    device to run dry; by then one more step may have been computed, but nothing is saved before
    `settle` has seen every step.

    Args:
        run: what is trained.

    Attributes:
        last: the last loss that was read.
    """

    def __init__(self, run: Run) -> None:
        self.last: float | None = None
        self._run = run
        self._newest: TakenStep | None = None
        self._pending: _Pending | None = None

    def push(self, taken: TakenStep, result: StepResult) -> None:
        """Note a step, and check the one before it (on a CPU, this one too).

        Raises:
            DivergedError: a loss or a gradient is not finite.
        """
        self._flush()
        self._newest = taken
        values = torch.stack([result.mean_loss.double(), result.gradient_norm.double()])
        if values.device.type != "cuda":
            self._pending = _Pending(taken, values, None)
            self._flush()
            return
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self._pending = _Pending(taken, host, ready)

    def settle(self) -> None:
        """Make sure that the state is worth saving: check the last step, and all weights.

        Raises:
            DivergedError: a loss, a gradient or, in any process, a weight is not finite.
        """
        self._flush()
        if self._newest is None:
            return
        # Even after finite gradients; and the statistics of batch normalisation are each process's.
        spoilt = (~_all_finite(self._run.state.model)).double()
        self._run.team.sum_(spoilt)
        if spoilt:
            raise DivergedError("weights are not finite", self._newest)

    def _flush(self) -> None:
        if self._pending is None:
            return
        taken, values, ready = self._pending
        self._pending = None
        if ready is not None:
            ready.synchronize()
        self.last = float(values[0])
        if not values[0].isfinite():
            raise DivergedError(f"the loss is {self.last}", taken)
        if not values[1].isfinite():
            raise DivergedError(f"the norm of the gradient is {float(values[1])}", taken)


def _all_finite(model: nn.Module) -> Tensor:
    tensors = [value for value in model.state_dict().values() if value.is_floating_point()]
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()


def recover(run: Run, divergence: DivergedError, reporter: Reporter) -> None:
    """List the images of the batch; then go back to the last checkpoint, or end the run.

    Every process calls this at the same step. The number of rollbacks is saved with the
    checkpoint, so that a run that dies afterwards goes on with the same learning rate.

    Raises:
        SanctlError: TRAIN.on_divergence says so, or TRAIN.rollbacks are used up.
    """
    train, state = run.config.TRAIN, run.state
    listed = _list_images(run, divergence.taken)
    if train.on_divergence == "stop":
        raise SanctlError(
            f"{divergence}: stopped, nothing of it is saved; {listed}; try a lower TRAIN.base_lr, "
            "TRAIN.warmup_epochs, TRAIN.clip_grad, or TRAIN.on_divergence=rollback"
        )
    done = state.rollbacks + 1
    if done > train.rollbacks:
        raise SanctlError(
            f"{divergence}: stopped after {state.rollbacks} rollbacks (TRAIN.rollbacks), nothing "
            f"of it is saved; {listed}; try a lower TRAIN.base_lr or TRAIN.clip_grad"
        )
    notes: list[str] = []
    start = find_start(run.folder, "auto", notes)
    for note in notes:
        reporter.note(note)
    if start is None:
        raise SanctlError(f"{divergence}: no checkpoint in {run.folder.model} to go back to")
    run.team.require_same(f"the checkpoint of rollback {done}", start.position)
    state.restore(start.checkpoint, start.path)
    state.rollbacks = done
    if run.team.first:
        run.checkpoint(start.checkpoint.scores).save(start.path)
    reporter.note(
        f"{divergence}: back to {start.path}, learning rate times {train.rollback_lr_factor:g}, "
        f"rollback {done} of {train.rollbacks}; {listed}"
    )


def _list_images(run: Run, taken: TakenStep) -> str:
    """Add the batch of a step to the list, and say where: epoch, step, process, image, by tabs."""
    own = [
        f"{taken.epoch}\t{taken.step}\t{run.team.rank}\t{printable(run.image_name(number))}\n"
        for number in taken.images.tolist()
    ]
    lines = [line for part in run.team.gather(own) for line in part]
    path = run.folder.root / FILE
    try:
        if run.team.first:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
    except OSError as error:
        return f"the batch's images cannot be listed in {path} ({error.strerror or error})"
    return f"{path} lists the batch's images"
