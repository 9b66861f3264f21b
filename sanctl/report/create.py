"""The reporters that a training run has."""

from pathlib import Path

from sanctl.report.console import is_live, out
from sanctl.report.csvlog import CsvReporter
from sanctl.report.plain import PlainReporter
from sanctl.report.reporter import CompositeReporter, Reporter
from sanctl.report.tensorboard import TensorBoardReporter
from sanctl.report.terminal import TerminalReporter
from sanctl.report.textlog import TextLogReporter


def create_reporter(run_folder: Path, print_freq: int) -> CompositeReporter:
    """Return everything that shows a run: files in its folder, and stdout.

    Args:
        run_folder: Gets `metrics.csv`, `train.log` and TensorBoard events.
        print_freq: Steps between two lines of `train.log`, and of stdout where it is no terminal.
    """
    screen: Reporter = TerminalReporter() if is_live(out) else PlainReporter(print_freq)
    return CompositeReporter(
        [
            CsvReporter(run_folder / "metrics.csv", screen.note),
            TensorBoardReporter(run_folder, screen.note),
            TextLogReporter(run_folder / "train.log", print_freq, screen.note),
            screen,
        ]
    )
