"""When a run's state is saved, and under which names."""

from pathlib import Path
from typing import NoReturn

from sanctl.engine.interrupt import InterruptedRunError, StopRequest
from sanctl.engine.run import Run

Scores = dict[str, float]


def save_beginning(run: Run) -> None:
    """Save the state before the first step, where a divergence may have to go back to it."""
    if run.config.TRAIN.on_divergence == "rollback" and not run.folder.resumable():
        _save_newest(run, {})


def save_step(run: Run) -> None:
    """Save the state in the middle of an epoch."""
    _save_newest(run, {})


def save_epoch(run: Run, scores: Scores, best: bool) -> None:
    """Save the state after an epoch: as the best when it is, as the newest when that is due."""
    train, epoch = run.config.TRAIN, run.state.epoch
    # The best first: where a run dies between the two, the resumed one does the epoch again.
    if best:
        _save(run, scores, run.folder.best)
    if epoch % train.save_freq == 0 or epoch == train.epochs:
        _save_newest(run, scores)


def save_and_stop(run: Run, stop: StopRequest, scores: Scores) -> NoReturn:
    """Save the state, after an epoch or in the middle of one, and end the run."""
    state = run.state
    where = f"epoch {state.epoch}"
    if state.step:
        where = f"epoch {state.epoch + 1}, step {state.step}"
    path = _save_newest(run, scores)
    raise InterruptedRunError(f"interrupted after {where}; saved {path}", stop.agreed)


def _save_newest(run: Run, scores: Scores) -> Path:
    """Save the state under the name of its epoch and step, and remove the oldest checkpoint."""
    state = run.state
    if state.step:
        path = run.folder.checkpoint(state.epoch + 1, state.step)
    else:
        path = run.folder.checkpoint(state.epoch)
    _save(run, scores, path)
    if run.team.first:
        run.folder.prune()
    return path


def _save(run: Run, scores: Scores, path: Path) -> None:
    if run.team.first:
        run.checkpoint(scores).save(path)
