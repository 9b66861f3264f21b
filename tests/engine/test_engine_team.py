"""What several processes compute together is what one computes alone."""

import io
import logging
import signal
import time
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from team_run import run_team
from tiny_run import FilesOnly, Place
from torch import Tensor, nn

from sanctl.config.load import load_config
from sanctl.config.schema import DataConfig, TrainConfig
from sanctl.data.loader import eval_loader
from sanctl.data.normalize import Normalizer
from sanctl.engine import board as board_module
from sanctl.engine import run as run_module
from sanctl.engine.board import RankBoard
from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.device import Precision
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import InterruptedRunError, StopRequest
from sanctl.engine.losses import smoothed_cross_entropy
from sanctl.engine.metrics import ClassificationMetrics
from sanctl.engine.run import Run, open_run
from sanctl.engine.state import TrainState
from sanctl.engine.steps import InputPipe, TrainStep, infer
from sanctl.engine.team import ALONE, Team
from sanctl.engine.watch import StepClock
from sanctl.errors import UserError
from sanctl.report.records import RankRecord, StepRecord
from sanctl.report.reporter import Reporter
from sanctl.report.streams import log_above_drawings
from sanctl_models import Network

CPU = torch.device("cpu")
KEYS = (
    "TRAIN.ema_decay=0.7",
    "TRAIN.accumulate=2",
    "TRAIN.clip_grad=1",
    "TRAIN.label_smoothing=0.1",
    "TRAIN.epochs=2",
)


class WithoutBatchNorm(Network):
    """Batch normalisation is of each process's own images, and so differs by their number."""

    def __init__(self) -> None:
        super().__init__(1, 8)
        torch.manual_seed(5)
        self.body = nn.Conv2d(1, 8, 5, stride=4)
        self.fc = nn.Linear(8, 3)

    def feature_maps(self, x: Tensor) -> Tensor:
        return self.body(x).relu()


class Drawings:
    """Images in memory, of three classes in turn."""

    def __init__(self, count: int) -> None:
        self.classes = ["a", "b", "c"]
        self.targets = np.arange(count) % 3

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20), dtype=np.uint8)
        return cv2.imencode(".png", pixels)[1].tobytes()


def scores_of(count: int, team: Team, batch: int = 5) -> tuple[list[int], list[list[int]], float]:
    """What an evaluation of `count` images counts, and its loss."""
    data = DataConfig(data_root="x", classes=3, grayscale=True, image_size=16, resize=16)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval()
    pipe = InputPipe(Normalizer(data.mean, data.std), CPU, channels_last=False)
    batches = eval_loader(
        Drawings(count), data, batch_size=batch, workers=0, share=team.share, ignore_label=-1
    )
    metrics = ClassificationMetrics(3, -1, CPU)
    for _, logits, targets in infer(model, batches, pipe, Precision("cpu")):
        metrics.update(logits, targets, smoothed_cross_entropy(logits, targets, 0.0, -1))
    metrics.gather(team)
    return metrics.counts.tolist(), metrics.confusion.tolist(), metrics.compute()["loss"]


def steps_of(team: Team) -> tuple[list[float], list[float]]:
    """Losses and weights of steps with ignored labels, which fall on some processes only."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    train = TrainConfig(model="resnet26", base_lr=0.5, accumulate=2)
    state = TrainState(model, train, Precision("cpu"))
    state.begin_epoch(train)
    replica = team.replicate(model, CPU)
    step = TrainStep(state, train, replica, replica, Precision("cpu"), 3, team)
    losses = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(7, 1, 4, 4, dtype=torch.float64, generator=generator)
        targets = torch.tensor([-1, -1, -1, -1, 0, 1, 2])
        rows = torch.from_numpy(team.share.of(np.arange(7)))
        losses.append(float(step(images[rows], targets[rows], 1, number).mean_loss))
    return losses, [value for weight in model.parameters() for value in weight.flatten().tolist()]


class AtStep(Reporter):
    """Asks this process to stop at a step."""

    def __init__(self, epoch: int, step: int) -> None:
        self._at = (epoch, step)

    def step(self, record: StepRecord) -> None:
        if (record.epoch, record.step) == self._at:
            signal.raise_signal(signal.SIGUSR1)


def open_without_batch_norm(config: Path, exp: Path, team: Team, resume: str | None = None) -> Run:
    loaded = load_config(config, [*KEYS, f"TRAIN.save_path={exp}"])
    before = run_module.build_network
    run_module.build_network = lambda config: WithoutBatchNorm()
    try:
        return open_run(loaded, device="cpu", resume=resume, team=team)
    finally:
        run_module.build_network = before


def train(config: Path, exp: Path, team: Team, stop: StopRequest | None = None) -> None:
    run = open_without_batch_norm(config, exp, team)
    fit(run, FilesOnly(run) if team.first else Reporter(), stop)


def interrupt(config: Path, exp: Path, team: Team, stop: StopRequest) -> tuple[str, int]:
    """Train until the last process alone is asked to stop, at epoch 2, step 2."""
    run = open_without_batch_norm(config, exp, team)
    last = team.rank == team.size - 1
    try:
        fit(run, AtStep(2, 2) if last else FilesOnly(run) if team.first else Reporter(), stop)
    except InterruptedRunError as error:
        return str(error), error.number
    return "not interrupted", 0


def records_of(team: Team) -> list[RankRecord]:
    """What rank 0 hears of all processes."""
    board_module.INTERVAL = 0.05
    heard: list[RankRecord] = []
    with RankBoard(team, CPU) as board:
        board.step_done(team.rank + 10, StepClock())
        deadline = time.monotonic() + 60
        while team.first and not heard and time.monotonic() < deadline:
            time.sleep(0.01)
            heard = board.news()
        team.agree(0, at_once=True)  # the others leave their records until rank 0 has them
    return heard


def disagreement(team: Team) -> str:
    try:
        team.require_same("the answer", 42 if team.first else 43)
    except UserError as error:
        return str(error)
    return ""


def evaluate_all(team: Team, _: StopRequest) -> list[Any]:
    return [scores_of(count, team) for count in range(1, 18)]


def do_all(team: Team, stop: StopRequest, config: Path, folder: Path) -> dict[str, Any]:
    train(config, folder / f"by_{team.size}", team, stop)
    return {
        "evaluations": evaluate_all(team, stop),
        "steps": steps_of(team),
        "said": team.first_says("word", f"from {team.rank}"),
        "disagreement": disagreement(team),
        "records": records_of(team),
        "message": interrupt(config, folder / f"stopped_{team.size}", team, stop),
    }


def assert_same_run(ours: Path, expected: Path) -> None:
    tables = [pd.read_csv(folder / "metrics.csv") for folder in (ours, expected)]
    pd.testing.assert_frame_equal(tables[0], tables[1], rtol=1e-5)
    saved = [load_checkpoint(folder / "model" / "train_epoch_2.pth") for folder in (ours, expected)]
    assert saved[0].ema is not None
    assert saved[1].ema is not None
    for one, other in ((saved[0].state_dict, saved[1].state_dict), (saved[0].ema, saved[1].ema)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_compute_what_one_does(place: Place, size: int) -> None:
    """Batches of 4 of 18 images: the last has 2, so that of three processes one has none."""
    answers = run_team(size, do_all, place.config, place.folder)
    train(place.config, place.folder / "alone", ALONE)
    assert_same_run(place.folder / f"by_{size}", place.folder / "alone")

    expected = [scores_of(count, ALONE) for count in range(1, 18)]
    losses, weights = steps_of(ALONE)
    for rank, answer in enumerate(answers):
        assert [found[:2] for found in answer["evaluations"]] == [found[:2] for found in expected]
        assert [found[2] for found in answer["evaluations"]] == pytest.approx(
            [found[2] for found in expected]
        )
        assert answer["steps"][0] == pytest.approx(losses, rel=1e-12)
        assert answer["steps"][1] == pytest.approx(weights, rel=1e-12)
        assert answer["said"] == "from 0"
        assert bool(answer["disagreement"]) == (rank > 0)
    assert "process 1 on" in answers[1]["disagreement"]
    assert [(record.rank, record.step) for record in answers[0]["records"]] == [
        (rank, rank + 10) for rank in range(size)
    ]

    stopped = place.folder / f"stopped_{size}"
    (message,) = {answer["message"] for answer in answers}
    (saved,) = (stopped / "model").glob("train_epoch_2_step_*.pth")
    step = load_checkpoint(saved).step
    assert step in (2, 3)  # that of the request, or the next
    text = f"interrupted after epoch 2, step {step}; saved {saved}"
    assert message == (text, signal.SIGUSR1)
    resumed = open_without_batch_norm(place.config, stopped, ALONE, resume="auto")
    fit(resumed, FilesOnly(resumed))
    assert_same_run(stopped, place.folder / "alone")


def remarks_on_a_replica(team: Team, _: StopRequest) -> tuple[list[str], list[str]]:
    """What is logged and warned of while a compiled replica takes a step, and of something else."""
    logged = io.StringIO()
    replica = team.replicate(nn.Conv2d(3, 8, 1), CPU)
    (weight,) = (weight for weight in replica.parameters() if weight.dim() == 4)
    weight.register_hook(lambda gradient: gradient.as_strided((8, 3, 1, 1), (3, 1, 3, 3)))
    compiled = torch.compile(replica, backend="aot_eager")
    log_above_drawings()  # to what stderr is at the time
    with warnings.catch_warnings(record=True) as warned, redirect_stderr(logged):
        for logger in map(logging.getLogger, ("torch.utils.cpp_extension", "torch._dynamo.x")):
            logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
            logger.warning("something else")
        compiled(torch.randn(2, 3, 4, 4)).sum().backward()
        warnings.warn("something else", stacklevel=1)
    return logged.getvalue().splitlines(), [str(warning.message) for warning in warned]


def test_what_torch_remarks_in_every_process_is_left_out() -> None:
    for logged, warned in run_team(2, remarks_on_a_replica):
        assert len(logged) == 2
        assert all(line.endswith("something else") for line in logged)
        assert warned == ["something else"]


def test_eight_processes_evaluate_every_image_once() -> None:
    expected = [scores_of(count, ALONE) for count in range(1, 18)]
    for answer in run_team(8, evaluate_all):
        assert [found[:2] for found in answer] == [found[:2] for found in expected]


def test_an_evaluation_alone_counts_every_image() -> None:
    for count in range(1, 18):
        counts, confusion, _ = scores_of(count, ALONE)
        assert counts[2] == count
        assert [sum(row) for row in confusion] == [len(range(k, count, 3)) for k in range(3)]


def test_mixup_has_one_lam_and_partners_of_the_own_share() -> None:
    from sanctl.engine.losses import Mixup

    draws = [Mixup.draw(0.4, 6, (1, 2, 3), CPU, rank) for rank in range(3)]
    assert len({draw.lam for draw in draws}) == 1
    partners: list[Tensor] = [draw.partners for draw in draws]
    assert all(sorted(values.tolist()) == list(range(6)) for values in partners)
    assert len({tuple(values.tolist()) for values in partners}) > 1


def test_a_process_alone_has_one_record() -> None:
    (record,) = records_of(ALONE)
    assert (record.rank, record.step, record.gpu) == (0, 10, None)


def test_sync_bn_is_for_gpus(place: Place) -> None:
    with pytest.raises(UserError, match=r"TRAIN\.sync_bn"):
        open_run(place.load("TRAIN.sync_bn=true"), device="cpu", resume=None, team=Team(0, 2, 2))


def test_a_share_of_one_image_is_not_normalised_alone(place: Place) -> None:
    """18 images at 32 px in batches of 6, of which a ResNet leaves 1 x 1."""
    keys = ["TRAIN.arch=resnet", "TRAIN.layers=[1,1,1,1]", "TRAIN.batch_size=6", "TRAIN.sa_type="]
    loaded = place.load(*keys, "TRAIN.widths=", "TRAIN.kernels=")
    open_run(loaded, device="cpu", resume=None, team=Team(0, 3, 3))
    with pytest.raises(UserError, match=r"4 processes.* normalised alone"):
        open_run(loaded, device="cpu", resume=None, team=Team(0, 4, 4))
