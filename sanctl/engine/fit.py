"""Training: for each epoch train, evaluate, report, save."""

import math
import time
from pathlib import Path
from typing import NoReturn

from torch import nn

from sanctl.engine.interrupt import InterruptedRunError, StopRequest
from sanctl.engine.losses import smoothed_cross_entropy
from sanctl.engine.metrics import ClassificationMetrics
from sanctl.engine.run import Run
from sanctl.engine.skipped import SkippedImages, too_small_to_normalise
from sanctl.engine.steps import TrainStep, infer
from sanctl.engine.watch import DivergedError, LossWatch, StepClock, is_finite
from sanctl.report.lognotes import log_as_notes
from sanctl.report.records import EpochRecord, RunSummary, StepRecord
from sanctl.report.reporter import Reporter

Scores = dict[str, float]


def fit(run: Run, reporter: Reporter) -> RunSummary:
    """Train a run from where its state stands to its last epoch.

    Args:
        run: put together by `open_run`.
        reporter: hears of every step and epoch.

    Returns:
        The best epoch and its score.

    Raises:
        DivergedError: a loss or a weight is not finite.
        SanctlError: a checkpoint cannot be written.
        InterruptedRunError: Ctrl-C was pressed; the state is saved, and the message says where.
    """
    started = time.perf_counter()
    for note in run.notes:
        reporter.note(note)
    done, epochs = run.state.epoch, run.config.TRAIN.epochs
    if done >= epochs:
        reporter.note(f"nothing left to train: epoch {done} is done, TRAIN.epochs is {epochs}")
        return _summary(run, started)
    run.folder.prepare(run.config, run.device)
    reporter.run_started(run.info())
    with log_as_notes(reporter.note), StopRequest() as stop:
        while run.state.epoch < epochs:
            scores, timing = _train_epoch(run, reporter, stop)
            scores |= _evaluate_epoch(run, reporter, stop)
            best = run.state.finish_epoch(_ranked_score(scores, reporter))
            # Reported first: where a run dies between the two, the resumed one does the epoch
            # again and reports it again, while an epoch saved unreported would have no row.
            reporter.epoch_finished(EpochRecord(run.state.epoch, epochs, scores, best, timing))
            _save_epoch(run, scores, best)
            if stop.pending:
                _save_and_stop(run, scores)
    summary = _summary(run, started)
    reporter.run_finished(summary)
    return summary


def _summary(run: Run, started: float) -> RunSummary:
    return RunSummary(
        best_epoch=run.state.best_epoch or None,
        best_top1=run.state.best_score if run.state.best_epoch else None,
        seconds=time.perf_counter() - started,
        run_folder=run.folder.root,
    )


def _train_epoch(run: Run, reporter: Reporter, stop: StopRequest) -> tuple[Scores, Scores]:
    """Train for the epoch after those complete, from the step where it stands."""
    state, train = run.state, run.config.TRAIN
    epoch, steps = state.epoch + 1, len(run.train)
    rate = state.begin_epoch(train)
    metrics = ClassificationMetrics(len(run.classes), train.ignore_label, run.device)
    if state.metrics is not None:
        metrics.load_state_dict(state.metrics)
    train_step = TrainStep(state, train, run.forward, run.precision, run.seed)
    watch, clock = LossWatch(), StepClock()
    reporter.epoch_started(epoch, steps, state.step)
    state.model.train()
    skipped = SkippedImages(run.folder.root, "train", reporter.note, whole=state.step == 0)
    too_small = too_small_to_normalise(state.model, run.config, run.device)
    for batch in clock.timed(skipped.usable(run.train.epoch(epoch, state.step), too_small)):
        if batch is None:
            state.step += 1
            continue
        images, targets = run.pipe(batch)
        logits, loss = train_step(images, targets, epoch, state.step)
        metrics.update(logits, targets, loss)
        state.step += 1
        watch.push(epoch, state.step, rate, loss)
        clock.step_done(len(images))
        reporter.step(_step_record(run, epoch, state.step, steps, clock, watch.last, rate))
        if stop.pending:
            break
    watch.flush()
    state.metrics = metrics.state_dict()
    if stop.pending:
        _save_and_stop(run, {})
    scores = {"epoch": epoch, "lr": rate}
    scores |= {f"{name}_train": value for name, value in metrics.compute().items()}
    return scores, clock.timing()


def _evaluate_epoch(run: Run, reporter: Reporter, stop: StopRequest) -> Scores:
    """Score the validation images with the weights of the epoch just trained."""
    if run.val is None:
        return {}
    train = run.config.TRAIN
    epoch, steps = run.state.epoch + 1, len(run.val)
    metrics = ClassificationMetrics(len(run.classes), train.ignore_label, run.device)
    clock = StepClock()
    reporter.evaluation_started(steps)
    forward = run.forward if run.state.ema is None else run.state.ema.module
    evaluated: nn.Module = run.state.evaluated
    evaluated.eval()
    batches = SkippedImages(run.folder.root, "val", reporter.note).usable(run.val)
    results = infer(forward, clock.timed(filter(None, batches)), run.pipe, run.precision)
    for step, (batch, logits, targets) in enumerate(results, start=1):
        metrics.update(
            logits, targets, smoothed_cross_entropy(logits, targets, 0.0, train.ignore_label)
        )
        clock.step_done(len(batch.images))
        reporter.evaluation_step(_step_record(run, epoch, step, steps, clock))
        if stop.pending:
            _save_and_stop(run, {})
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


def _save_epoch(run: Run, scores: Scores, best: bool) -> None:
    """Save the state after an epoch: as the best when it is, as the newest when that is due."""
    train, epoch = run.config.TRAIN, run.state.epoch
    # The best first: where a run dies between the two, the resumed one does the epoch again.
    if best:
        _save(run, scores, run.folder.best)
    if epoch % train.save_freq == 0 or epoch == train.epochs:
        _save(run, scores, run.folder.checkpoint(epoch))
        run.folder.prune()


def _save_and_stop(run: Run, scores: Scores) -> NoReturn:
    """Save the state, after an epoch or in the middle of one, and end the run."""
    state = run.state
    if state.step:
        where = f"epoch {state.epoch + 1}, step {state.step}"
        path = run.folder.checkpoint(state.epoch + 1, state.step)
    else:
        where = f"epoch {state.epoch}"
        path = run.folder.checkpoint(state.epoch)
    _save(run, scores, path)
    run.folder.prune()
    raise InterruptedRunError(f"interrupted after {where}; saved {path}")


def _save(run: Run, scores: Scores, path: Path) -> None:
    """Save the state, unless it is not worth going on from."""
    state = run.state
    if not is_finite(state.model):  # the last step can do this with a loss that was still finite
        epoch, step = (state.epoch + 1, state.step) if state.step else (state.epoch, len(run.train))
        raise DivergedError("weights are not finite", epoch, step, state.lr)
    run.checkpoint(scores).save(path)
