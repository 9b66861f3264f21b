"""`sanctl config new`: write a complete, commented configuration file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanctl.cli.arguments import Overrides

if TYPE_CHECKING:
    from sanctl.config.new import DatasetFacts


def new(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="A dataset preset (`sanctl config list`), or your dataset's name.",
        ),
    ],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model preset (`sanctl config list`).")
    ],
    data_root: Annotated[
        Path | None,
        typer.Option(help="Folder of the dataset; your own is looked for at dataset/DATASET."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="Number of classes; counted in the dataset's folder.")
    ] = None,
    grayscale: Annotated[
        bool | None,
        typer.Option("--grayscale/--color", help="Channels; seen in the dataset's images."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the network's input, in pixels (224).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file; config/DATASET/DATASET_MODEL.yaml.")
    ] = None,
    override: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a complete configuration file in which every key is explained.

    DATASET is a preset or your own dataset: what lies in its folder decides how it is read.
    """
    from sanctl.config.load import config_path
    from sanctl.config.new import DatasetFacts
    from sanctl.report.console import out as console

    given = DatasetFacts(
        data_root=None if data_root is None else str(data_root),
        classes=classes,
        grayscale=grayscale,
        image_size=image_size,
    )
    path = out or config_path(dataset, model)
    facts = write_config(dataset, model, given, path, override or [], force)
    console.print(f"wrote {path}")
    if facts.dataset_init is not None:
        console.print(f"dataset: {_described(facts)}")
    if out is None:
        console.print(f"next: sanctl train {dataset} {model}")
    else:
        console.print(f"next: sanctl config check {path}")


def write_config(
    dataset: str,
    model: str,
    given: "DatasetFacts",
    path: Path,
    overrides: list[str],
    force: bool = False,
) -> "DatasetFacts":
    """Compose a configuration from presets and from what lies in the dataset's folder; write it.

    Args:
        dataset: A dataset preset, or a name for the user's own dataset.
        model: A model preset.
        given: What the user says of the dataset, which is not looked for.
        path: The file to write.
        overrides: Settings `SECTION.key=value`.
        force: Replace a file that is there.

    Returns:
        What is known of the dataset.

    Raises:
        UserError: A name or a setting is wrong, the dataset is missing or not prepared, or the
            file is there already.
    """
    from sanctl.config.new import compose_new, write_new

    facts = _complete(dataset, given, _allows_outside(overrides))
    write_new(compose_new(dataset, model, facts, overrides), path, force)
    return facts


def _allows_outside(overrides: list[str]) -> bool:
    """Return whether the settings let an index name images outside its folder."""
    from sanctl.config.layers import Layers

    layers = Layers("override")
    layers.add_overrides(overrides)
    return layers.values.get("DATA.allow_outside") is True


def _complete(dataset: str, given: "DatasetFacts", allow_outside: bool) -> "DatasetFacts":
    """Add to what the user says what can be seen in the dataset's folder."""
    from dataclasses import replace

    from sanctl.config.presets import dataset_names, preset_data_root
    from sanctl.errors import UserError

    is_preset = dataset in dataset_names()
    default_root = preset_data_root(dataset) if is_preset else f"dataset/{dataset}"
    root = Path(given.data_root or default_root)
    if not root.is_dir():
        # A preset, or a dataset whose classes are given, may come to its folder later.
        return given if given.classes is None or is_preset else replace(given, data_root=str(root))
    from sanctl.data.detect import count_classes, detect_storage, looks_grayscale

    kind = detect_storage(root)
    if kind is None and not is_preset:
        raise UserError(
            f"{root}: no training and validation images there; `sanctl dataset index` and"
            " `sanctl dataset split` make them"
        )
    if kind is None:
        return given
    classes = given.classes or count_classes(root, kind)
    gray = given.grayscale
    if gray is None and not is_preset:
        gray = looks_grayscale(root, kind, classes, allow_outside)
    return replace(given, data_root=str(root), dataset_init=kind, classes=classes, grayscale=gray)


def _described(facts: "DatasetFacts") -> str:
    colour = {True: ", grayscale", False: ", colour", None: ""}[facts.grayscale]
    return f"{facts.data_root}, {facts.dataset_init}, {facts.classes} classes{colour}"
