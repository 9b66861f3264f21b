"""`sanctl demo`: the whole story, from images to a tested network, on drawings of its own."""

import contextlib
import csv
import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from sanctl.cli import config, dataset
from sanctl.cli.arguments import Device
from sanctl.cli.test import test
from sanctl.cli.train import train
from sanctl.errors import UserError

IMAGES_PER_CLASS = 160
SEED = 0
DRAWINGS = Path("dataset/demo/drawings")
RUN = Path("exp/demo/san_tiny")
MADE = (DRAWINGS.parent, Path("config/demo/demo_san_tiny.yaml"), RUN)
"""What the demo makes in its folder, and what the next demo there replaces."""
MARKER = ".sanctl-demo"
MARKER_TEXT = f"""\
Made by `sanctl demo`. Another demo in this folder replaces {", ".join(map(str, MADE))}.
Everything else here is left alone.
"""
SETTINGS = (
    *("DATA.image_size=64", "TRAIN.sa_type=1", "TRAIN.epochs=6", "TRAIN.batch_size=32"),
    *("TRAIN.optimizer=adamw", "TRAIN.base_lr=0.003", "TRAIN.weight_decay=0.05"),
    *("TRAIN.channels_last=true", "TRAIN.workers=0", "TRAIN.manual_seed=0"),
    "TEST.test_workers=0",
)


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to work in; made when missing.")
    ] = Path("demo"),
    device: Device = None,
) -> None:
    """Draw sketches, then index, split, pack, configure, train and test; two minutes on a CPU.

    Every command is shown before it runs, so that each can be repeated by hand in DIR.
    """
    from sanctl.engine.device import choose_device
    from sanctl.report.console import out as console

    choose_device(device, gpus=[0])  # refuses a wrong one before anything is made
    started = time.monotonic()
    replaced = prepare_folder(out)
    if replaced:
        console.print(f"{out}: starting afresh, in place of {', '.join(map(str, replaced))}")
    console.print(f"$ cd {shlex.quote(str(out))}", style="bold")
    with contextlib.chdir(out):
        _draw()
        for command in story(device):
            _run(command)
        _report(out, time.monotonic() - started)


def prepare_folder(folder: Path) -> list[Path]:
    """Make the folder, or make an earlier demo's folder ready for the next one.

    Only a folder that carries the demo's marker is touched, and only what the demo made in it.

    Returns:
        What was removed, relative to the folder.

    Raises:
        UserError: The folder holds something else, or cannot be made or written.
    """
    marker = folder / MARKER
    try:
        if folder.exists() and not marker.is_file() and not _is_empty_folder(folder):
            raise UserError(
                f"{folder}: exists and was not made by the demo; choose another with --out DIR"
            )
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(MARKER_TEXT, encoding="utf-8")
        return [made for made in MADE if _remove(folder / made)]
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; choose another folder with --out DIR"
        ) from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _remove(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return True
    existed = path.is_symlink() or path.exists()
    path.unlink(missing_ok=True)
    return existed


def story(device: str | None) -> list[str]:
    """Return the demo's commands, as they are typed in its folder.

    Args:
        device: Where to compute; None leaves the choice to the commands.
    """
    settings = " ".join(f"-o {setting}" for setting in SETTINGS)
    on_device = f" --device {device}" if device else ""
    return [
        f"sanctl dataset index {DRAWINGS}",
        "sanctl dataset split --ratio 0.8",
        "sanctl dataset pack",
        f"sanctl config new demo san_tiny {settings}",
        f"sanctl train demo san_tiny --no-test{on_device}",
        f"sanctl test --checkpoint {RUN}/model/model_best.pth{on_device}",
    ]


def _draw() -> None:
    from sanctl.data.drawings import SHAPES, draw_dataset
    from sanctl.report.console import out, progress

    with progress("draw", total=IMAGES_PER_CLASS * len(SHAPES)) as advance:
        count = draw_dataset(DRAWINGS, IMAGES_PER_CLASS, SEED, advance)
    out.print(f"drew {count} sketches of {len(SHAPES)} shapes in {DRAWINGS}: {', '.join(SHAPES)}")


def _run(command: str) -> None:
    """Show a command, then run it through the parser and the function that a shell would reach.

    Raises:
        typer.Exit: It ended with a status other than 0.
    """
    from sanctl.report.console import out

    out.print()
    out.print(f"$ {command}", style="bold")
    commands = typer.Typer()
    commands.add_typer(dataset.app, name="dataset")
    commands.add_typer(config.app, name="config")
    commands.command("train")(train)
    commands.command("test")(test)
    name, *arguments = shlex.split(command)
    status = commands(arguments, prog_name=name, standalone_mode=False)
    if status:
        raise typer.Exit(status)


def _report(folder: Path, seconds: float) -> None:
    from sanctl.report.console import clock, out

    with (RUN / "metrics.csv").open(newline="", encoding="utf-8") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["top1_val"]))
    out.print()
    out.print(
        f"The demo took {clock(seconds)}. Best validation top-1: {float(best['top1_val']):.1f} % "
        f"after epoch {best['epoch']} (chance: 10 %).",
        style="bold",
    )
    out.print(f"""\
What lies where in {folder}:
  {DRAWINGS}  the sketches; their index, parts and packs lie beside it
  {MADE[1]}  the configuration, with every key explained
  {RUN}  the run: metrics.csv, plots/, TensorBoard events
  {RUN}/model/model_best.pth  the checkpoint that was tested
  {RUN}/test  scores of each class, confusion matrix, worst mistakes
What to try next:
  cd {shlex.quote(str(folder))}
  tensorboard --logdir exp  (after: pip install tensorboard)
  sanctl train demo san_tiny -o TRAIN.epochs=20 -o TRAIN.save_path=exp/demo/longer
  your own images, in a folder for each class under dataset/NAME/images:
    sanctl dataset index dataset/NAME/images, and then the same commands""")
