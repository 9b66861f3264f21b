"""`sanctl config show`: the values that hold, and where each came from."""

from pathlib import Path
from typing import Annotated

import typer

from sanctl.cli.arguments import Overrides


def show(
    dataset: Annotated[str, typer.Argument(metavar="DATASET|FILE", help="A dataset, or a file.")],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="NAME of config/DATASET/DATASET_NAME.yaml, or a preset."
        ),
    ] = None,
    override: Overrides = None,
) -> None:
    """Show every value of a configuration and where it came from: default, file or override."""
    from sanctl.config.load import load_config, resolve_config
    from sanctl.config.render import format_value
    from sanctl.report.console import err
    from sanctl.report.tables import print_table

    overrides = override or []
    if name is None:
        loaded = load_config(Path(dataset), overrides)
    else:
        loaded = resolve_config(dataset, name, overrides)
    rows = []
    for key, origin in loaded.origins.items():
        section, _, field = key.partition(".")
        rows.append([key, format_value(getattr(getattr(loaded.config, section), field)), origin])
    print_table(["key", "value", "from"], rows)
    for note in loaded.notes:
        err.print(f"note: {note}")
