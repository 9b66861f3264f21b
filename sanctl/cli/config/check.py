"""`sanctl config check`: read configurations and build their networks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sanctl.config.load import LoadedConfig


def check(
    targets: Annotated[
        list[str], typer.Argument(metavar="FILE...|DATASET NAME", help="Files, or one by its name.")
    ],
) -> None:
    """Check configurations: keys, types, values, and that the network can be built.

    Prints one line per file; exits with 2 when something is wrong.
    """
    from sanctl.config.load import load_config, resolve_config
    from sanctl.errors import UserError
    from sanctl.report.console import err, out

    by_name = len(targets) == 2 and not any(_is_file(target) for target in targets)
    names = [" ".join(targets)] if by_name else targets
    problems: list[str] = []
    for name in names:
        try:
            loaded = resolve_config(targets[0], targets[1]) if by_name else load_config(Path(name))
            out.print(f"{loaded.path or name}: ok, {describe_network(loaded)}")
            for note in loaded.notes:
                err.print(f"note: {note}")
        except UserError as error:
            found = str(error).splitlines()
            out.print(f"{name}: {len(found)} problem{'s' if len(found) > 1 else ''}")
            problems += found
    if problems:
        raise UserError("\n".join(problems))


def describe_network(loaded: "LoadedConfig") -> str:
    """Build a configuration's network without memory for its weights, and describe it.

    Raises:
        UserError: The network cannot be built, or the images are too small for it.
    """
    import torch

    from sanctl.engine.run import build_network
    from sanctl.errors import UserError

    train, data = loaded.config.TRAIN, loaded.config.DATA
    try:
        with torch.device("meta"):
            network = build_network(loaded.config)
    except UserError as error:
        raise UserError(f"{loaded.path or 'preset'}: {error}") from error
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return (
        f"{train.model or train.arch} with {parameters / 1e6:.1f}M parameters, {data.classes}"
        f" classes, {data.in_chans} x {data.image_size} x {data.image_size} px"
    )


def _is_file(target: str) -> bool:
    return target.endswith((".yaml", ".yml")) or Path(target).is_file()
