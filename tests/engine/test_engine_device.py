import platform
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_run import FilesOnly, Place, ctrl_c_at

from sanctl.config.schema import TrainConfig
from sanctl.engine.checkpoint import load_checkpoint
from sanctl.engine.device import Precision, choose_device, describe_device
from sanctl.engine.fit import fit
from sanctl.engine.interrupt import InterruptedRunError
from sanctl.engine.losses import smoothed_cross_entropy
from sanctl.engine.metrics import ClassificationMetrics
from sanctl.engine.run import Run, open_run
from sanctl.engine.steps import TrainStep
from sanctl.engine.team import ALONE
from sanctl.errors import SanctlError, UserError
from sanctl.report.records import RunSummary

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def on_gpu(function):  # type: ignore[no-untyped-def]
    missing = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a CUDA device")(function))


def test_the_cpu_is_described_with_its_threads() -> None:
    assert choose_device("cpu", [0]) == CPU
    assert describe_device(CPU) == f"CPU, {torch.get_num_threads()} thread" + (
        "s" if torch.get_num_threads() > 1 else ""
    )


FAULTS = """
import resource, torch
from sanctl.engine.device import keep_freed_memory

def page_faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = page_faults(100)
keep_freed_memory()
print(given_back, page_faults(100))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_large_buffers_are_used_again() -> None:
    command = [sys.executable, "-c", FAULTS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    given_back, kept = map(int, result.stdout.split())
    # 40 MB a hundred times, in pages of 4 KiB or even of 2 MiB; kept, only the first few times.
    assert given_back >= 100 * 10
    assert kept < given_back / 4


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}") as caught:
        choose_device(name, [0])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_cpu_is_chosen_and_cuda_refused() -> None:
    assert choose_device(None, [3]) == CPU
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("cuda", [0])


def test_mixed_precision_is_for_gpus() -> None:
    assert Precision.choose(True, CPU) == Precision.choose(False, CPU) == Precision("cpu")
    assert str(Precision("cpu")) == "float32"
    assert str(Precision("cuda", torch.bfloat16)) == "mixed bfloat16"
    assert not Precision("cpu").grad_scaler().is_enabled()


def open_on_gpu(place: Place, *overrides: str, exp: str, resume: str | None = None) -> Run:
    return open_run(place.load(*overrides, exp=exp), device="cuda", resume=resume)


def train(place: Place, *overrides: str, exp: str) -> RunSummary:
    run = open_on_gpu(place, *overrides, exp=exp)
    return fit(run, FilesOnly(run))


def weights(path: Path) -> bytes:
    state = load_checkpoint(path).state_dict
    return b"".join(value.numpy().tobytes() for value in state.values())


SAN = ("TRAIN.base_lr=0.01",)
PATCHWISE = (*SAN, "TRAIN.sa_type=1")
RESNET = (
    "TRAIN.arch=resnet",
    "TRAIN.layers=[1,1,1,1]",
    "DATA.image_size=64",
    "DATA.resize=64",
    "TRAIN.base_lr=0.01",
)
HYBRID = (
    "TRAIN.arch=hybrid",
    "TRAIN.layer_types=[res, san, nl]",
    "TRAIN.widths=[64, 64, 64]",
    "TRAIN.added_nl_blocks=[1, 0, 0]",
    "DATA.image_size=64",
    "DATA.resize=64",
    "TRAIN.base_lr=0.01",
)


@on_gpu
@pytest.mark.parametrize(
    ("keys", "compiled"),
    [(SAN, "false"), (PATCHWISE, "false"), (RESNET, "true")],  # the others compile for minutes
    ids=["pair", "patch", "resnet"],
)
def test_a_gpu_trains_with_everything_that_is_fast(
    place: Place, keys: tuple[str, ...], compiled: str
) -> None:
    keys = (*keys, "TRAIN.epochs=1", "TRAIN.batch_size=18", "TRAIN.batch_size_val=18")
    fast = ("TRAIN.amp=true", f"TRAIN.compile={compiled}", "TRAIN.channels_last=true")
    train(place, *keys, exp="plain")
    train(place, *keys, *fast, exp="fast")
    plain, quick = (pd.read_csv(place.folder / exp / "metrics.csv") for exp in ("plain", "fast"))
    assert quick.loss_train[0] == pytest.approx(plain.loss_train[0], rel=0.03)
    keys_of = [
        load_checkpoint(place.folder / exp / "model" / "model_best.pth").state_dict.keys()
        for exp in ("plain", "fast")
    ]
    assert keys_of[0] == keys_of[1]


@on_gpu
@pytest.mark.parametrize(
    "keys", [SAN, PATCHWISE, RESNET, HYBRID], ids=["pair", "patch", "resnet", "hybrid"]
)
def test_a_deterministic_run_is_the_same_twice(place: Place, keys: tuple[str, ...]) -> None:
    keys = (*keys, "TRAIN.deterministic=true", "TRAIN.epochs=2", "TRAIN.ema_decay=0.9")
    for exp in ("a", "b"):
        train(place, *keys, exp=exp)
    a, b = (place.folder / exp for exp in ("a", "b"))
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    assert weights(a / "model" / "train_epoch_2.pth") == weights(b / "model" / "train_epoch_2.pth")


@on_gpu
def test_an_interrupted_run_goes_on_bit_for_bit_on_a_gpu(place: Place) -> None:
    keys = (
        *SAN,
        "TRAIN.deterministic=true",
        "TRAIN.amp=true",
        "TRAIN.mixup_alpha=0.4",
        "TRAIN.ema_decay=0.7",
    )
    train(place, *keys, exp="whole")
    run = open_on_gpu(place, *keys, exp="parts")
    with pytest.raises(InterruptedRunError):
        fit(run, FilesOnly(run, ctrl_c_at(2, 3)))
    run = open_on_gpu(place, *keys, exp="parts", resume="auto")
    fit(run, FilesOnly(run))
    whole, parts = (place.folder / exp for exp in ("whole", "parts"))
    assert (whole / "metrics.csv").read_text() == (parts / "metrics.csv").read_text()
    name = Path("model") / "train_epoch_3.pth"
    assert weights(whole / name) == weights(parts / name)


@on_gpu
def test_a_loss_that_is_not_finite_stops_a_gpu_run(place: Place) -> None:
    with pytest.raises(SanctlError, match=r"epoch 1, step \d+, learning rate 1e\+20"):
        train(place, "TRAIN.base_lr=1e20", exp="run")
    assert not list((place.folder / "run" / "model").iterdir())


@on_gpu
def test_steps_and_metrics_do_not_wait_for_the_gpu() -> None:
    torch.manual_seed(0)
    from sanctl.engine.state import TrainState
    from sanctl_models import create_model

    keys = {"mixup_alpha": 0.4, "ema_decay": 0.9, "accumulate": 2, "clip_grad": 1.0}
    train = TrainConfig(model="resnet26", label_smoothing=0.1, **keys)  # type: ignore[arg-type]
    model = create_model("resnet26", num_classes=7).to(GPU)
    precision = Precision.choose(True, GPU)
    state = TrainState(model, train, precision)
    step = TrainStep(state, train, model, model, precision, seed=0, team=ALONE)
    metrics = ClassificationMetrics(7, -1, GPU)
    images = torch.randn(8, 3, 64, 64, device=GPU)
    targets = torch.arange(8, device=GPU) % 7

    def once(number: int) -> None:
        logits, loss, *_ = step(images, targets, 1, number)
        metrics.update(logits, targets, loss)
        metrics.update(logits, targets, smoothed_cross_entropy(logits, targets, 0.0, -1))

    once(0)  # makes handles, workspaces and optimiser state
    torch.cuda.set_sync_debug_mode("error")
    try:
        once(1)
        once(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.compute()["loss"] > 0


@on_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_gpu_and_cpu_agree_on_the_first_step(place: Place, workers: int) -> None:
    keys = (*SAN, "TRAIN.epochs=1", "TRAIN.batch_size=18", f"TRAIN.workers={workers}")
    train(place, *keys, "TRAIN.deterministic=true", exp="gpu")
    run = place.open(*keys, exp="cpu")
    fit(run, FilesOnly(run))
    gpu, cpu = (pd.read_csv(place.folder / exp / "metrics.csv") for exp in ("gpu", "cpu"))
    assert gpu.loss_train[0] == pytest.approx(cpu.loss_train[0], rel=1e-4)


@on_gpu
def test_a_gpu_checkpoint_is_tested_on_a_cpu(place: Place) -> None:
    train(place, *SAN, "TRAIN.epochs=1", exp="exp/shapes/tiny")
    status, out, err = place.main(
        "test", "--checkpoint", "exp/shapes/tiny/model/model_best.pth", "--device", "cpu"
    )
    assert status == 0, err
    assert "on val images" in out
