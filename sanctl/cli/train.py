"""`sanctl train`: train a network, then test its best checkpoint."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from sanctl.cli.arguments import Device, Overrides
from sanctl.report.style import ProgressStyle

if TYPE_CHECKING:
    from sanctl.engine.run import Run
    from sanctl.report.reporter import Reporter


def train(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Dataset: the folder of the config file.")
    ],
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Network: config/DATASET/DATASET_NAME.yaml, or a preset."
        ),
    ],
    override: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH", help="Go on from the run's newest checkpoint, or from this one."
        ),
    ] = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")
    ] = False,
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Test the best checkpoint at the end.")
    ] = True,
    progress: Annotated[
        ProgressStyle,
        typer.Option(help="A screen, key=value lines, or the end alone; auto: what suits stdout."),
    ] = ProgressStyle.AUTO,
) -> None:
    """Train a network, then test its best checkpoint.

    Ctrl-C saves at the next step and says how to go on; a second one stops at once.
    """
    from sanctl.config.load import resolve_config
    from sanctl.report.console import require_live

    overrides = override or []
    if progress is ProgressStyle.RICH:
        require_live()
    # Before the import of torch, which takes seconds: a typing error is told at once.
    loaded = resolve_config(dataset, name, overrides)

    from sanctl.engine.run import open_run
    from sanctl.report.create import create_reporter
    from sanctl.report.plots import plot_curves

    run = open_run(loaded, device=device, resume=resume)
    if dry_run:
        _print_plan(run)
        return
    reporter = create_reporter(run.folder.root, run.config.TRAIN.print_freq, progress)
    try:
        _fit(run, reporter, _command_to_go_on(dataset, name, overrides, device))
    finally:
        reporter.close()
    plot_curves(run.folder.metrics, run.folder.plots)
    if test:
        _test_best(run, quiet=progress is ProgressStyle.NONE)


def _fit(run: "Run", reporter: "Reporter", command: str) -> None:
    """Train; after Ctrl-C, say with which command to go on."""
    from sanctl.engine.fit import fit
    from sanctl.engine.interrupt import InterruptedRunError

    try:
        fit(run, reporter)
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error}; go on with: {command}") from error
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"interrupted at once, without saving; go on from the last checkpoint with: {command}"
        ) from error


def _command_to_go_on(dataset: str, name: str, overrides: list[str], device: str | None) -> str:
    options = [word for override in overrides for word in ("-o", override)]
    if device is not None:
        options += ["--device", device]
    return shlex.join(["sanctl", "train", dataset, name, *options, "--resume", "auto"])


def _print_plan(run: "Run") -> None:
    from sanctl.report.console import out
    from sanctl.report.tables import print_table

    info = run.info()
    rows = [(key.replace("_", " "), str(getattr(info, key))) for key in info.__slots__]
    print_table(["what", "value"], rows, title="A dry run: this would be trained")
    for note in run.notes:
        out.print(f"note: {note}")


def _test_best(run: "Run", quiet: bool) -> None:
    from sanctl.cli.test import test_and_print

    best = run.folder.best
    path = best if best.exists() else run.folder.checkpoints()[-1]  # no best without evaluation
    test_and_print(run.config, path, run.folder.test, run.device, quiet=quiet)
