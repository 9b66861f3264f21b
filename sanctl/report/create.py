"""The reporters that a training run has."""

from collections.abc import Callable
from pathlib import Path

from sanctl.report.console import err, is_live, out
from sanctl.report.csvlog import CsvReporter
from sanctl.report.plain import PlainReporter
from sanctl.report.quiet import QuietReporter
from sanctl.report.reporter import CompositeReporter, Reporter
from sanctl.report.style import ProgressStyle
from sanctl.report.tensorboard import TensorBoardReporter
from sanctl.report.terminal import TerminalReporter
from sanctl.report.textlog import TextLogReporter


def create_reporter(
    run_folder: Path, print_freq: int, style: ProgressStyle = ProgressStyle.AUTO
) -> CompositeReporter:
    """Return everything that shows a run: files in its folder, and stdout.

    Args:
        run_folder: Gets `metrics.csv`, `train.log` and TensorBoard events.
        print_freq: Steps between two lines of `train.log`, and of stdout where it gets lines.
        style: How stdout shows it; `rich` needs one that can redraw (`require_live`).
    """
    screen, warn = _screen(style, print_freq)
    return CompositeReporter(
        [
            CsvReporter(run_folder / "metrics.csv", warn),
            TensorBoardReporter(run_folder, warn),
            TextLogReporter(run_folder / "train.log", print_freq, warn),
            screen,
        ]
    )


def _screen(style: ProgressStyle, print_freq: int) -> tuple[Reporter, Callable[[str], None]]:
    """Return what shows a run on stdout, and what tells of a file that cannot be written."""
    if style is ProgressStyle.NONE:
        return QuietReporter(), lambda text: err.print(f"warning: {text}")
    draws = is_live(out) if style is ProgressStyle.AUTO else style is ProgressStyle.RICH
    screen = TerminalReporter() if draws else PlainReporter(print_freq)
    return screen, screen.note
