"""Measures what drawing a run on a terminal costs: the README's figure.

    python tests/report/time_screen.py

The time is that of the processor which draws, and so does not depend on what else runs.
"""

import io
import sys
import time
from pathlib import Path

from rich.console import Console

from sanctl.report.records import EpochRecord, GpuReading, RankRecord, RunInfo, StepRecord
from sanctl.report.terminal import SECONDS_BETWEEN_DRAWINGS, TerminalReporter

EPOCHS, DRAWINGS = 30, 200
SCORES = ("lr", "loss_train", "top1_train", "top5_train", "loss_val", "top1_val", "top5_val")
INFO = RunInfo(
    dataset="pets",
    name="san10",
    network="san10_pairwise",
    parameters=10**7,
    classes=10,
    train_images=50_000,
    val_images=10_000,
    device="NVIDIA H200",
    precision="bfloat16",
    epochs=100,
    first_epoch=1,
    steps_per_epoch=100,
    batch_size=256,
    run_folder=Path("exp/pets/san10"),
)


def seconds_of_a_drawing(processes: int) -> float:
    """Draw a run in its 31st epoch, 120 columns wide; return the mean time of a drawing."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=50)
    reporter = TerminalReporter(console, seconds_between_drawings=1e6)
    reporter.run_started(INFO)
    for epoch in range(1, EPOCHS + 1):
        values = {"epoch": epoch} | dict.fromkeys(SCORES, 0.5)
        timing = {"seconds": 3.0, "images_per_s": 1000.0, "data_wait": 0.1}
        reporter.epoch_finished(EpochRecord(epoch, INFO.epochs, values, False, timing))
    reporter.epoch_started(EPOCHS + 1, INFO.steps_per_epoch, 0)
    gpu = GpuReading(50.0, 10**9, 10**11, 300.0, 50.0)
    reporter.ranks(
        [
            RankRecord(rank, "host", f"NVIDIA H200 (cuda:{rank})", 3, 1000.0, 0.01, gpu)
            for rank in range(processes)
        ]
    )
    reporter.step(StepRecord(EPOCHS + 1, INFO.epochs, 3, 100, 1000.0, 0.01, 0.5, 0.1))
    start = time.thread_time()
    for _ in range(DRAWINGS):
        reporter.draw()
    seconds = (time.thread_time() - start) / DRAWINGS
    reporter.close()
    return seconds


def main() -> None:
    for processes in (1, 8):
        seconds = seconds_of_a_drawing(processes)
        share = 100 * seconds / SECONDS_BETWEEN_DRAWINGS
        sys.stdout.write(
            f"{processes} processes: {1e3 * seconds:.2f} ms, {share:.2f} % of a step\n"
        )


if __name__ == "__main__":
    main()
