"""The reporters that a training run has."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from sanctl.errors import UserError
from sanctl.report.console import err, is_live, out
from sanctl.report.csvlog import CsvReporter
from sanctl.report.plain import PlainReporter
from sanctl.report.quiet import QuietReporter
from sanctl.report.reporter import CompositeReporter, Reporter
from sanctl.report.tensorboard import TensorBoardReporter
from sanctl.report.terminal import TerminalReporter
from sanctl.report.textlog import TextLogReporter


class ProgressStyle(StrEnum):
    """How stdout shows a run.

    `auto` draws on a terminal and writes lines elsewhere, `rich` draws, `plain` writes lines, and
    `none` tells only how it ended.
    """

    AUTO = "auto"
    RICH = "rich"
    PLAIN = "plain"
    NONE = "none"


def choose_style(style: ProgressStyle) -> ProgressStyle:
    """Return how stdout shows a run: what is asked for, or for `auto` what suits it.

    Raises:
        UserError: It cannot draw.
    """
    if style is ProgressStyle.RICH and not is_live(out):
        raise UserError(
            "--progress rich: standard output is no terminal that can redraw; use --progress plain"
        )
    if style is not ProgressStyle.AUTO:
        return style
    return ProgressStyle.RICH if is_live(out) else ProgressStyle.PLAIN


def create_reporter(
    run_folder: Path, print_freq: int, style: ProgressStyle = ProgressStyle.AUTO
) -> CompositeReporter:
    """Return everything that shows a run: files in its folder, and stdout.

    Args:
        run_folder: Gets `metrics.csv`, `train.log` and TensorBoard events.
        print_freq: Steps between two lines of `train.log`, and of stdout where it gets lines.
        style: How stdout shows it.

    Raises:
        UserError: stdout cannot show it so.
    """
    screen, warn = _screen(choose_style(style), print_freq)
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
    screen = TerminalReporter() if style is ProgressStyle.RICH else PlainReporter(print_freq)
    return screen, screen.note
