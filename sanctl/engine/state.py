"""What training changes: weights, optimiser, average, and how far it has come."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sanctl.config.schema import TrainConfig
from sanctl.engine.checkpoint import Checkpoint
from sanctl.engine.device import Precision
from sanctl.engine.optim import build_ema, build_optimizer, learning_rate
from sanctl.errors import UserError
from sanctl_models import load_state


class TrainState:
    """The state that a checkpoint holds and a resumed run goes on from.

    Args:
        model: the network, on its device.
        train: the configuration's TRAIN section.
        precision: decides whether gradients are scaled.

    Attributes:
        epoch: complete epochs.
        step: steps done of the epoch after those.
        metrics: sums of that epoch's scores, if it has been begun.
        rollbacks: how often the run went back to a checkpoint, to a lower learning rate.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, precision: Precision) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, train)
        self.scaler = precision.grad_scaler()
        self.ema = build_ema(model, train.ema_decay)
        self.epoch = train.start_epoch
        self.step = 0
        self.metrics: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.best_score = -1.0
        self.rollbacks = 0

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The learning rate of the last steps."""
        return float(self.optimizer.param_groups[0]["lr"])

    def begin_epoch(self, train: TrainConfig) -> float:
        """Set the learning rate of the epoch about to run, and return it."""
        rate = learning_rate(train, self.epoch + 1) * train.rollback_lr_factor**self.rollbacks
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def finish_epoch(self, score: float | None) -> bool:
        """Count an epoch as complete.

        Args:
            score: its validation top-1 in percent, if it was validated.

        Returns:
            Whether it is the best so far.
        """
        self.epoch += 1
        self.step = 0
        self.metrics = None
        best = score is not None and score > self.best_score
        if best and score is not None:
            self.best_epoch, self.best_score = self.epoch, score
        return best

    def checkpoint(self) -> Checkpoint:
        """Everything here as a checkpoint; the tensors are shared, not copied."""
        under_way = self.step > 0
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            rng["cuda"] = torch.cuda.get_rng_state()
        return Checkpoint(
            state_dict=self.model.state_dict(),
            epoch=self.epoch + under_way,
            step=self.step if under_way else None,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            ema=None if self.ema is None else self.ema.state_dict(),
            rng=rng,
            metrics=self.metrics,
            best_epoch=self.best_epoch,
            best_score=self.best_score,
            rollbacks=self.rollbacks,
        )

    def restore(self, saved: Checkpoint, path: Path) -> None:
        """Go on from a checkpoint.

        Momentum and moments come from the checkpoint; learning rate, weight decay and the like
        from the configuration, so that a resumed run may change them.

        Raises:
            UserError: the checkpoint is of another network or another optimiser.
        """
        load_weights(self.model, saved.state_dict, path)
        if saved.optimizer is not None:
            self._restore_optimizer(saved.optimizer, path)
        if saved.scaler:
            self.scaler.load_state_dict(saved.scaler)
        self._restore_ema(saved)
        self.epoch = saved.epoch if saved.step is None else saved.epoch - 1
        self.step = saved.step or 0
        self.metrics = saved.metrics
        self.best_epoch, self.best_score = saved.best_epoch, saved.best_score
        self.rollbacks = saved.rollbacks
        if "cpu" in saved.rng:
            torch.set_rng_state(saved.rng["cpu"])
        if "cuda" in saved.rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved.rng["cuda"])

    def _restore_optimizer(self, saved: dict, path: Path) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        same_count = [len(group["params"]) for group in saved.get("param_groups", [])] == [
            len(group["params"]) for group in groups
        ]
        moments = {key for entry in saved.get("state", {}).values() for key in entry}
        ours = {"exp_avg", "exp_avg_sq", "step"} if "betas" in groups[0] else {"momentum_buffer"}
        if not same_count or not moments <= ours:
            raise UserError(
                f"{path}: its optimiser state is not of this configuration's TRAIN.optimizer; "
                "start from its weights alone with TRAIN.weight"
            )
        state = saved.get("state", {})
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _restore_ema(self, saved: Checkpoint) -> None:
        if self.ema is None:
            return
        if saved.ema is None:  # the average is new in this run: it starts at the weights
            self.ema.module.load_state_dict(self.model.state_dict())
        else:
            self.ema.load_state_dict(saved.ema)


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: Path, head: bool = True
) -> None:
    """Load weights strictly, with or without the prefix `module.`.

    Args:
        model: the network.
        weights: its state_dict.
        path: the file they come from, for the message.
        head: whether the classifier `fc` is loaded too.

    Raises:
        UserError: tensors are missing, left over or of another shape; says which.
    """
    try:
        load_state(model, weights, head=head)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
