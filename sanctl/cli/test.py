"""`sanctl test`: score a checkpoint, overall and class by class."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sanctl.cli.arguments import Device, Overrides

if TYPE_CHECKING:
    import torch

    from sanctl.config.schema import Config
    from sanctl.engine.checkpoint import Checkpoint


def test(
    dataset: Annotated[
        str | None,
        typer.Argument(metavar="DATASET", help="Dataset; not needed for a checkpoint of sanctl."),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Network of the config file.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Checkpoint; default: the best of DATASET NAME."),
    ] = None,
    override: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; default: the run's test/.")
    ] = None,
    device: Device = None,
) -> None:
    """Test a checkpoint: scores overall and by class, confusion matrix, the worst mistakes.

    A checkpoint of sanctl carries its configuration: --checkpoint FILE is enough. A published one
    does not: name DATASET and NAME too.
    """
    from sanctl.engine.checkpoint import load_checkpoint
    from sanctl.engine.device import choose_device
    from sanctl.engine.runfolder import RunFolder
    from sanctl.errors import UserError

    if dataset is not None and name is None:
        raise UserError("name the network too: sanctl test DATASET NAME")
    if dataset is None and checkpoint is None:
        raise UserError("say what to test: --checkpoint FILE, or DATASET NAME")
    saved = None if checkpoint is None else load_checkpoint(checkpoint)
    config = _configuration(dataset, name, checkpoint, saved, override or [])
    folder = RunFolder(config.run_dir)
    if dataset is None and checkpoint is not None and out is None:
        _require_own_folder(folder.root, checkpoint)
    path = checkpoint or Path(config.TEST.model_path or folder.best)
    target = choose_device(device, config.TEST.test_gpu)
    test_and_print(config, path, out or folder.test, target, saved)


def _configuration(
    dataset: str | None,
    name: str | None,
    checkpoint: Path | None,
    saved: "Checkpoint | None",
    overrides: list[str],
) -> "Config":
    """The configuration of DATASET NAME, or else the one in the checkpoint."""
    from sanctl.config.load import parse_config, resolve_config
    from sanctl.errors import UserError

    if dataset is not None and name is not None:
        return resolve_config(dataset, name, overrides).config
    assert checkpoint is not None
    assert saved is not None
    if saved.config is None:
        raise UserError(
            f"{checkpoint}: carries no configuration; name its dataset and network: "
            f"sanctl test DATASET NAME --checkpoint {checkpoint}"
        )
    return parse_config(_without_consent(saved.config), str(checkpoint), overrides)


def _without_consent(config: dict[str, Any]) -> dict[str, Any]:
    """Drop DATA.allow_outside: who wrote a checkpoint cannot allow it in the user's name."""
    data = config.get("DATA")
    if not isinstance(data, dict):
        return config
    return config | {"DATA": {key: data[key] for key in data if key != "allow_outside"}}


def _require_own_folder(root: Path, checkpoint: Path) -> None:
    """Refuse to write where a checkpoint says, unless it lies there or that is a place here.

    Raises:
        UserError: It is another place.
    """
    from sanctl.errors import UserError

    is_its_own = checkpoint.resolve().parent.parent == root.resolve()
    if not is_its_own and not root.resolve().is_relative_to(Path.cwd()):
        raise UserError(
            f"{checkpoint}: would write its results to {root}, outside the current folder; choose "
            "where to with --out DIR"
        )


def test_and_print(
    config: "Config",
    path: Path,
    folder: Path,
    device: "torch.device",
    saved: "Checkpoint | None" = None,
    quiet: bool = False,
) -> None:
    """Test a checkpoint and print its scores.

    Args:
        config: how to build the network and where the images are.
        path: the checkpoint's file.
        folder: where the results go.
        device: what to compute on.
        saved: the checkpoint, if it has been read already.
        quiet: print the scores alone, without progress and notes.
    """
    from sanctl.engine.checkpoint import load_checkpoint
    from sanctl.engine.testing import open_test_source, run_test
    from sanctl.report.console import err, out, progress, silent
    from sanctl.report.lognotes import log_as_notes
    from sanctl.report.tables import print_scores

    saved = saved or load_checkpoint(path)
    source, split = open_test_source(config)

    messages = silent if quiet else err

    def note(text: str) -> None:
        messages.print(f"note: {text}")

    with progress(f"test {split}", len(source), messages) as advance, log_as_notes(note):
        result = run_test(config, saved, path, source, split, folder, device, advance, note)
    epoch = f" (epoch {result.epoch})" if result.epoch else ""
    out.print(f"{path}{epoch} on {split} images:")
    out.print()
    print_scores(
        result.overall,
        [score for score in result.per_class if score.images],
        folder / "per_class.csv",
    )
    out.print()
    out.print(f"{result.mistakes} mistakes; the worst are drawn in {folder / 'mistakes.png'}")
    out.print(
        f"wrote per_class.csv, predictions.csv, confusion_matrix.png, mistakes.png to {folder}"
    )
