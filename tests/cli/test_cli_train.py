import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from tiny_run import Place, write_dataset
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from sanctl.engine.checkpoint import load_checkpoint
from sanctl_models.sam import SAM

FAST = ("-o", "TRAIN.epochs=1", "-o", "TRAIN.workers=0")


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_training_tests_its_best_checkpoint_at_the_end(place: Place) -> None:
    status, out, _ = place.main("train", "shapes", "tiny", "-o", "TRAIN.epochs=2")
    assert status == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)  # no control characters in a pipe
    best = load_checkpoint(place.model / "model_best.pth")
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["epoch=1", "epoch=2"]
    assert sum(line.startswith("train ") for line in out.splitlines()) == 2 * 3  # print_freq 2
    assert f"exp/shapes/tiny/model/model_best.pth (epoch {best.epoch}) on val images:" in out
    table = pd.read_csv(place.run / "test" / "per_class.csv")
    correct = (table.top1 * table.images).sum() / table.images.sum()
    assert correct == pytest.approx(best.scores["top1_val"])
    for name in ("config.yaml", "env.json", "metrics.csv", "train.log"):
        assert (place.run / name).stat().st_size > 0
    assert list((place.run / "plots").glob("*.png"))


def test_progress_plain_is_what_a_pipe_gets_anyway(place: Place) -> None:
    status, out, _ = place.main("train", "shapes", "tiny", *FAST, "--no-test")
    assert status == 0
    plain = place.main(
        *("train", "shapes", "tiny", *FAST, "--no-test", "--progress", "plain"),
        *("-o", "TRAIN.save_path=exp/again"),
    )
    assert plain[0] == 0
    words = [[line.split()[0] for line in text.splitlines()] for text in (out, plain[1])]
    assert words[0] == words[1]


def test_progress_none_tells_only_the_result(place: Place) -> None:
    status, out, err = place.main("train", "shapes", "tiny", *FAST, "--progress", "none")
    assert (status, err) == (0, "")
    first, second, *_ = out.splitlines()
    assert re.fullmatch(
        r"trained in 0:\d\d; best epoch 1, top-1 [\d.]+ %; see exp/shapes/tiny", first
    )
    assert second == "exp/shapes/tiny/model/model_best.pth (epoch 1) on val images:"
    assert "train epoch=1" in (place.run / "train.log").read_text()


def test_progress_none_still_says_what_went_wrong(place: Place) -> None:
    (place.run / "train.log").mkdir(parents=True)
    status, _, err = place.main("train", "shapes", "tiny", *FAST, "--progress", "none", "--no-test")
    assert status == 0
    assert err == "warning: exp/shapes/tiny/train.log: cannot be written (Is a directory); " + (
        "training goes on\n"
    )


def test_a_screen_is_not_drawn_into_a_pipe(place: Place) -> None:
    status, out, err = place.main("train", "shapes", "tiny", *FAST, "--progress", "rich")
    assert (status, out) == (2, "")
    assert "--progress plain" in one_line(err)
    assert not place.run.exists()
    status, out, err = place.main("train", "shapes", "tiny", *FAST, "--progress", "loud")
    assert (status, out) == (2, "")
    assert "loud" in one_line(err)


def test_no_test_leaves_it_out(place: Place) -> None:
    status, out, _ = place.main("train", "shapes", "tiny", *FAST, "--no-test")
    assert status == 0
    assert "on val images" not in out
    assert not (place.run / "test").exists()


def test_without_a_best_the_newest_checkpoint_is_tested(place: Place) -> None:
    options = ("-o", "TRAIN.evaluate=false", "-o", "TEST.use_val_set=false")
    status, out, _ = place.main("train", "shapes", "tiny", *FAST, *options)
    assert status == 0
    assert "train_epoch_1.pth (epoch 1) on test images:" in out


def test_a_dry_run_says_what_would_run_and_writes_nothing(place: Place) -> None:
    before = set(place.folder.rglob("*"))
    status, out, err = place.main("train", "shapes", "tiny", *FAST, "--dry-run")
    assert (status, err) == (0, "")
    for pattern in (r"train images +18", r"val images +12", r"run folder +exp/shapes/tiny"):
        assert re.search(pattern, out)
    assert set(place.folder.rglob("*")) == before


def test_a_run_is_not_written_over(place: Place) -> None:
    assert place.main("train", "shapes", "tiny", *FAST, "--no-test")[0] == 0
    status, out, err = place.main("train", "shapes", "tiny", *FAST, "--no-test")
    assert (status, out) == (2, "")
    line = one_line(err)
    assert "exp/shapes/tiny" in line
    assert "--resume auto" in line
    status, out, _ = place.main("train", "shapes", "tiny", *FAST, "--resume", "auto")
    assert status == 0
    assert "nothing left to train: epoch 1" in out
    assert "on val images" in out


def test_a_loss_that_is_not_finite(place: Place) -> None:
    status, _, err = place.main("train", "shapes", "tiny", "-o", "TRAIN.base_lr=1e20")
    assert status == 1
    line = one_line(err)
    assert re.search(r"the loss is (nan|inf) at epoch 1, step \d+, learning rate 1e\+20", line)
    assert not list(place.model.iterdir())
    assert not (place.run / "test").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_jpeg_in_the_middle_of_training(
    place: Place, tmp_path: Path, workers: int
) -> None:
    root = write_dataset(tmp_path / "data")
    path = root / "train" / "cross" / "9.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    assert cv2.imwrite(str(path), noise)
    path.write_bytes(path.read_bytes()[:900])
    options = ("-o", f"DATA.data_root={root}", "-o", f"TRAIN.workers={workers}")
    status, _, err = place.main("train", "shapes", "tiny", *options)
    assert status == 2
    assert str(path) in one_line(err)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("DATA.data_root=nowhere", "nowhere"),
        ("DATA.classes=4", "DATA.classes: 3"),
        ("TRAIN.epoch=3", "TRAIN.epochs"),
        ("DATA.image_size=4", "DATA.image_size 4"),
        ("TRAIN.weight=nowhere.pth", "nowhere.pth"),
        ("TRAIN.resume=nowhere.pth", "nowhere.pth"),
        ("TRAIN.widths=[32, 33, 64]", "33"),
    ],
)
def test_a_wrong_value_is_one_line(place: Place, option: str, words: str) -> None:
    status, out, err = place.main("train", "shapes", "tiny", "-o", option)
    assert (status, out) == (2, "")
    assert words in one_line(err)
    assert not place.run.exists()


@pytest.mark.parametrize("variable", ["cupy", "nonsense"])
@pytest.mark.parametrize("command", ["train shapes tiny", "test shapes tiny", "demo"])
def test_a_backend_that_is_not_to_be_had_is_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch, variable: str, command: str
) -> None:
    monkeypatch.setenv("SANCTL_OPS_BACKEND", variable)
    before = set(place.folder.rglob("*"))
    status, out, err = place.main(*command.split(), "--device", "cpu")
    assert (status, out) == (2, "")
    line = one_line(err)
    assert variable in line
    assert "SANCTL_OPS_BACKEND" in line
    assert set(place.folder.rglob("*")) == before


@pytest.fixture
def _logging_operators() -> Iterator[None]:
    """Networks log from inside their forward passes, as the operators do on a GPU."""

    def log(module: nn.Module, *_: object) -> None:
        if isinstance(module, SAM):
            logging.getLogger("sanctl_ops").info("compiling %s", type(module).__name__)

    hook = register_module_forward_pre_hook(log)
    yield
    hook.remove()


@pytest.mark.usefixtures("_logging_operators")
def test_what_the_operators_log_reaches_the_user(place: Place) -> None:
    status, out, err = place.main("train", "shapes", "tiny", *FAST)
    assert status == 0
    log_lines = (place.run / "train.log").read_text().splitlines()
    for lines in (out.splitlines(), [line.partition(" ")[2] for line in log_lines]):
        first, *_ = [line for line in lines if not line.startswith(("run ", "note disk:"))]
        assert first == "note compiling SAM"
    assert err.splitlines()[0] == "note: compiling SAM"  # of the test that follows the training


@pytest.mark.usefixtures("_logging_operators")
def test_what_the_operators_log_before_the_run_is_a_note_of_the_run(place: Place) -> None:
    """A last batch of one image is tried out before anything is trained."""
    status, out, err = place.main(
        "train", "shapes", "tiny", "-o", "TRAIN.batch_size=17", "--dry-run"
    )
    assert (status, err) == (0, "")
    assert "note: compiling SAM" in out.splitlines()


@pytest.mark.parametrize("path", ["nowhere.pth", "config", "config/shapes/shapes_tiny.yaml"])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line(place: Place, path: str) -> None:
    status, _, err = place.main("train", "shapes", "tiny", "--resume", path)
    assert status == 2
    assert path in one_line(err)


def test_the_command_to_go_on_repeats_the_options() -> None:
    from sanctl.cli.processes import words
    from sanctl.cli.train import _command_to_go_on
    from sanctl.engine.placement import LaunchOptions

    command = _command_to_go_on(
        "shapes", "my net", ["TRAIN.save_path=a b", "TRAIN.epochs=2"],
        words(LaunchOptions("cpu", nproc=2, max_restarts=1)),
    )  # fmt: skip
    assert shlex.split(command) == [
        "sanctl", "train", "shapes", "my net", "-o", "TRAIN.save_path=a b", "-o", "TRAIN.epochs=2",
        "--device", "cpu", "--nproc", "2", "--max-restarts", "1", "--resume", "auto",
    ]  # fmt: skip


def test_a_full_disk_in_the_middle_of_a_run(place: Place) -> None:
    """The epoch before is intact, and the run goes on from it once there is space."""
    assert place.main("train", "shapes", "tiny", *FAST, "--no-test")[0] == 0
    before = {path: path.read_bytes() for path in place.model.iterdir()}
    options = ("-o", "TRAIN.epochs=2", "-o", "TRAIN.workers=0", "--no-test", "--resume", "auto")
    limit = 50_000  # bytes that a file may have: less than a checkpoint, more than all else
    assert min(len(content) for content in before.values()) > limit
    done = place.sanctl("train", "shapes", "tiny", *options, largest_file=limit)
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert "cannot write exp/shapes/tiny/model/" in line
    assert {path: path.read_bytes() for path in place.model.iterdir()} == before
    assert place.main("train", "shapes", "tiny", *options)[0] == 0
    assert pd.read_csv(place.run / "metrics.csv").epoch.tolist() == [1, 2]
