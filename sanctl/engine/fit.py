"""Training: for each epoch train, evaluate, report, save."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

from torch import nn

from sanctl.data.loader import Batch
from sanctl.engine.board import RankBoard
from sanctl.engine.divergence import DivergedError, DivergenceWatch, TakenStep, recover
from sanctl.engine.interrupt import StopRequest
from sanctl.engine.losses import smoothed_cross_entropy
from sanctl.engine.metrics import ClassificationMetrics
from sanctl.engine.run import Run
from sanctl.engine.saving import Scores, save_and_stop, save_beginning, save_epoch, save_step
from sanctl.engine.skipped import SkippedImages, too_small_to_normalise
from sanctl.engine.steps import TrainStep, infer
from sanctl.engine.watch import StepClock
from sanctl.report.lognotes import log_as_notes
from sanctl.report.records import EpochRecord, RunSummary, StepRecord
from sanctl.report.reporter import Reporter


def fit(run: Run, reporter: Reporter, stop: StopRequest | None = None) -> RunSummary:
    """Train a run from where its state stands to its last epoch.

    Args:
        run: put together by `open_run`.
        reporter: hears of every step and epoch.
        stop: hears of the signals that ask to stop, if something does already.

    Returns:
        The best epoch and its score.

    Raises:
        SanctlError: a checkpoint cannot be written; or a loss, gradient or weight is not finite,
            and that ends the run.
        InterruptedRunError: a signal asked to stop; the state is saved, and the message says where.
    """
    started = time.perf_counter()
    for note in run.notes:
        reporter.note(note)
    done, epochs = run.state.epoch, run.config.TRAIN.epochs
    if done >= epochs:
        reporter.note(f"nothing left to train: epoch {done} is done, TRAIN.epochs is {epochs}")
        return _summary(run, started)
    with (
        log_as_notes(reporter.note),
        nullcontext(stop) if stop else StopRequest(run.team) as stop,
        RankBoard(run.team, run.device) as board,
    ):
        if run.team.first:
            run.folder.prepare(run.config, run.device)
        reporter.run_started(run.info())
        save_beginning(run)
        _train_epochs(run, Audience(reporter, board), stop)
    summary = _summary(run, started)
    reporter.run_finished(summary)
    return summary


class Audience(NamedTuple):
    """Who hears of every step: the reporter, and through the board rank 0's."""

    reporter: Reporter
    board: RankBoard

    def step_done(self, record: StepRecord, clock: StepClock) -> None:
        """Tell what is to be told after every step, of training or evaluation."""
        self.board.step_done(record.step, clock)
        if records := self.board.news():
            self.reporter.ranks(records)


def _train_epochs(run: Run, audience: Audience, stop: StopRequest) -> None:
    reporter, epochs = audience.reporter, run.config.TRAIN.epochs
    while run.state.epoch < epochs:
        try:
            scores, timing = _train_epoch(run, audience, stop)
        except DivergedError as divergence:
            recover(run, divergence, reporter)
            continue
        scores |= _evaluate_epoch(run, audience, stop)
        best = run.state.finish_epoch(_ranked_score(scores, reporter))
        # Reported first: where a run dies between the two, the resumed one does the epoch
        # again and reports it again, while an epoch saved unreported would have no row.
        reporter.epoch_finished(EpochRecord(run.state.epoch, epochs, scores, best, timing))
        save_epoch(run, scores, best)
        if stop.agree(at_once=True):
            save_and_stop(run, stop, scores)


def _summary(run: Run, started: float) -> RunSummary:
    return RunSummary(
        best_epoch=run.state.best_epoch or None,
        best_top1=run.state.best_score if run.state.best_epoch else None,
        seconds=time.perf_counter() - started,
        run_folder=run.folder.root,
    )


def _train_epoch(run: Run, audience: Audience, stop: StopRequest) -> tuple[Scores, Scores]:
    """Train for the epoch after those complete, from the step where it stands."""
    state, train = run.state, run.config.TRAIN
    epoch, steps = state.epoch + 1, len(run.train)
    rate = state.begin_epoch(train)
    metrics = _begun_metrics(run)
    train_step = TrainStep(state, train, run.trains, run.replica, run.precision, run.seed, run.team)
    watch, clock = DivergenceWatch(run), StepClock()
    audience.reporter.epoch_started(epoch, steps, state.step)
    state.model.train()
    for batch in clock.timed(_train_batches(run, audience.reporter)):
        if batch is None:
            state.step += 1
            continue
        images, targets = run.pipe(batch)
        result = train_step(images, targets, epoch, state.step)
        metrics.update(result.logits, targets, result.loss, result.counted)
        clock.step_done(run.train.batch_length(state.step), len(batch.indices))
        state.step += 1
        watch.push(TakenStep(epoch, state.step, rate, batch.indices), result)
        record = _step_record(run, epoch, state.step, steps, clock, watch.last, rate)
        audience.reporter.step(record)
        audience.step_done(record, clock)
        if stop.agree():
            break
        if train.save_every_steps and state.step % train.save_every_steps == 0:
            watch.settle()
            state.metrics = metrics.gathered(run.team)
            save_step(run)
    watch.settle()
    metrics.gather(run.team)
    state.metrics = metrics.state_dict()
    if stop.agreed or stop.agree(at_once=True):
        save_and_stop(run, stop, {})
    scores = {"epoch": epoch, "lr": rate}
    scores |= {f"{name}_train": value for name, value in metrics.compute().items()}
    return scores, clock.timing()


def _begun_metrics(run: Run) -> ClassificationMetrics:
    metrics = ClassificationMetrics(len(run.classes), run.config.TRAIN.ignore_label, run.device)
    if run.state.metrics is not None and run.team.first:  # these are the sums of all processes
        metrics.load_state_dict(run.state.metrics)
    return metrics


def _train_batches(run: Run, reporter: Reporter) -> Iterator[Batch | None]:
    """The batches of the epoch after those complete, from the step on where it stands."""
    state = run.state
    return _skipped(run, "train", reporter, whole=state.step == 0).usable(
        run.train.epoch(state.epoch + 1, state.step),
        too_small_to_normalise(state.model, run.config, run.device),
        run.train.blank,
    )


def _skipped(run: Run, part: str, reporter: Reporter, whole: bool = True) -> SkippedImages:
    return SkippedImages(run.folder.root, part, reporter.note, whole, run.team, run.device)


def _evaluate_epoch(run: Run, audience: Audience, stop: StopRequest) -> Scores:
    """Score the validation images with the weights of the epoch just trained."""
    if run.val is None:
        return {}
    train = run.config.TRAIN
    epoch, steps = run.state.epoch + 1, len(run.val)
    metrics = ClassificationMetrics(len(run.classes), train.ignore_label, run.device)
    clock = StepClock()
    audience.reporter.evaluation_started(steps)
    forward = run.evaluates if run.state.ema is None else run.state.ema.module
    evaluated: nn.Module = run.state.evaluated
    run.team.share_buffers(evaluated)
    evaluated.eval()
    batches = _skipped(run, "val", audience.reporter).usable(run.val)
    results = infer(forward, clock.timed(filter(None, batches)), run.pipe, run.precision)
    for step, (batch, logits, targets) in enumerate(results, start=1):
        metrics.update(
            logits, targets, smoothed_cross_entropy(logits, targets, 0.0, train.ignore_label)
        )
        clock.step_done(run.val.batch_length(step - 1), len(batch.indices))
        record = _step_record(run, epoch, step, steps, clock)
        audience.reporter.evaluation_step(record)
        audience.step_done(record, clock)
        if stop.agree():
            save_and_stop(run, stop, {})
    metrics.gather(run.team)
    return {f"{name}_val": value for name, value in metrics.compute().items()}


def _ranked_score(scores: Scores, reporter: Reporter) -> float | None:
    """The score by which an epoch may become the best; None where it has none that counts."""
    if not math.isfinite(scores.get("loss_val", 0.0)):
        # No reason to stop: after few or large steps the running statistics of batch
        # normalisation, which only evaluation uses, may not have settled yet.
        reporter.note(
            f"epoch {scores['epoch']}: the validation loss is {scores['loss_val']}, so this epoch "
            "cannot be the best"
        )
        return None
    return scores.get("top1_val")


def _step_record(
    run: Run,
    epoch: int,
    step: int,
    steps: int,
    clock: StepClock,
    loss: float | None = None,
    lr: float | None = None,
) -> StepRecord:
    return StepRecord(
        epoch=epoch,
        epochs=run.config.TRAIN.epochs,
        step=step,
        steps=steps,
        images_per_s=clock.images_per_s,
        data_wait=clock.data_wait,
        loss=loss,
        lr=lr,
    )
