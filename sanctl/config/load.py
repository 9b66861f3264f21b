"""Files, presets and overrides -> one checked configuration that knows where each value came from.

Order of the layers: default < preset or file < override.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sanctl.config.checks import cross_check
from sanctl.config.document import parse_document
from sanctl.config.layers import Layers
from sanctl.config.presets import dataset_names, model_names, preset_layers
from sanctl.config.problems import field_problems, nearest_name
from sanctl.config.render import format_value
from sanctl.config.schema import ARCHS_OF_KEY, KEYS, SECTIONS, Config
from sanctl.errors import UserError, shown


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and its story.

    Attributes:
        config: The resolved values.
        path: The file it was read from; None for a preset.
        dataset: DATASET of `config/DATASET/DATASET_NAME.yaml`.
        name: NAME of it.
        origins: Where each key's value came from: `default`, `config/x.yaml:12`, `preset mnist`
            or `override`.
        notes: What the user should know: keys without effect, a preset in place of a file.
    """

    config: Config
    path: Path | None
    dataset: str
    name: str
    origins: dict[str, str]
    notes: list[str]

    @property
    def run_dir(self) -> Path:
        """The folder that the run writes to."""
        return self.config.run_dir


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read and check a configuration file.

    Args:
        path: The YAML file.
        overrides: Settings `SECTION.key=value` that replace the file's; values are YAML.

    Raises:
        UserError: The file is missing or wrong; one line for each thing to mend.
    """
    layers = Layers(str(path))
    layers.add_document(parse_document(_read(path), str(path)), str(path))
    layers.add_overrides(overrides)
    dataset, name = _names(path, layers)
    return _loaded(layers, path, dataset, name)


def resolve_config(
    dataset: str, name: str, overrides: Sequence[str] = (), root: Path = Path("config")
) -> LoadedConfig:
    """Find and check the configuration of a dataset and a name.

    It is `root/DATASET/DATASET_NAME.yaml`; where that does not exist, the presets of these names,
    and the result's notes say so.

    Raises:
        UserError: There is neither, or it is wrong.
    """
    path = config_path(dataset, name, root)
    if path.is_file():
        return load_config(path, overrides)
    if dataset not in dataset_names():
        raise UserError(_not_found(path, dataset, dataset_names(), "dataset", (dataset, name)))
    if name not in model_names():
        raise UserError(_not_found(path, name, model_names(), "model", (dataset, name)))
    layers = preset_layers(dataset, name)
    layers.add_overrides(overrides)
    note = (
        f"{path} does not exist, so the preset {dataset} {name} is used"
        f" (`sanctl config new {dataset} {name}` writes the file)"
    )
    return _loaded(layers, None, dataset, name, [note])


def parse_config(mapping: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Check a configuration that is there as a mapping, for example inside a checkpoint.

    Args:
        mapping: Sections of keys, as `Config.model_dump` gives them.
        source: What to call it in messages.
        overrides: Settings `SECTION.key=value` that replace the mapping's; values are YAML.

    Raises:
        UserError: It is wrong; one line for each thing to mend.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{source}: expected sections (DATA, TRAIN, ...), got {shown(mapping)}")
    layers = Layers(source)
    layers.add_mapping(mapping, {})
    layers.add_overrides(overrides)
    return check_layers(layers)


def config_to_yaml(config: Config) -> str:
    """Write every resolved value as plain YAML, which loads again to an equal configuration."""
    lines = []
    for section, values in config.model_dump().items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {format_value(value)}".rstrip() for key, value in values.items()]
    return "\n".join(lines) + "\n"


def config_path(dataset: str, name: str, root: Path = Path("config")) -> Path:
    """Return the path at which the configuration of a dataset and a name lies."""
    return root / dataset / f"{dataset}_{name}.yaml"


def check_layers(layers: Layers) -> Config:
    """Validate the layers.

    Raises:
        UserError: Something is wrong; one line for each thing to mend, all at once.
    """
    problems = list(layers.problems)
    wrong: frozenset[str] = frozenset()
    config: Config | None = None
    try:
        config = Config.model_validate(layers.nested())
    except ValidationError as error:
        found = field_problems(error)
        wrong = frozenset(key for key, _ in found)
        problems += [f"{layers.origins.get(key, layers.source)}: {text}" for key, text in found]
    for problem in cross_check(config or _without(layers, wrong)):
        if not wrong.intersection(problem.keys):
            given = [layers.origins[key] for key in problem.keys if key in layers.origins]
            where = given[0] if given else layers.source
            problems.append(f"{where}: {problem.keys[0]}: {problem.message}")
    if config is None or problems:
        raise UserError("\n".join(sorted(problems, key=_line_of)))
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; `sanctl config list` shows what there is, `sanctl config new`"
            " writes a new one"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _names(path: Path, layers: Layers) -> tuple[str, str]:
    """Take DATASET and NAME from the path, or from what the file says where it is elsewhere."""
    folder = path.absolute().parent.name
    if path.stem.startswith(f"{folder}_"):
        return folder, path.stem.removeprefix(f"{folder}_")
    root = Path(str(layers.values.get("DATA.data_root", "dataset")))
    return str(layers.values.get("DATA.data_name", root.name)), path.stem


def _loaded(
    layers: Layers, path: Path | None, dataset: str, name: str, notes: Sequence[str] = ()
) -> LoadedConfig:
    layers.values.setdefault("TRAIN.save_path", f"exp/{dataset}/{name}")
    unused = _drop_unused(layers)
    config = check_layers(layers)
    origins = {key: layers.origins.get(key, "default") for key in KEYS}
    all_notes = [*notes, *unused, *_notes(layers, config)]
    return LoadedConfig(config, path, dataset, name, origins, all_notes)


def _drop_unused(layers: Layers) -> list[str]:
    """Drop keys that the network's arch does not take, as old files carry them; say so."""
    arch = layers.values.get("TRAIN.arch")
    notes = []
    for key, archs in ARCHS_OF_KEY.items():
        name = f"TRAIN.{key}"
        if (
            arch in ("san", "resnet", "nl", "hybrid")
            and arch not in archs
            and name in layers.values
        ):
            notes.append(
                f"{layers.origins.pop(name)}: {name} has no effect: arch {arch} takes none"
            )
            del layers.values[name]
    return notes


def _line_of(problem: str) -> float:
    """Return the line that a problem names; those without one come last."""
    place = re.match(r".+?:(\d+): ", problem)
    return float(place[1]) if place else float("inf")


def _without(layers: Layers, wrong: frozenset[str]) -> Config:
    """Build what can be built without the wrong keys, so that the others are still checked."""
    sections = layers.nested(without=wrong)
    sections["DATA"] = {"data_root": ".", "classes": 2} | sections["DATA"]
    return Config.model_validate(sections)


def _notes(layers: Layers, config: Config) -> list[str]:
    notes = []
    for key, origin in layers.origins.items():
        section, _, field_name = key.partition(".")
        field = SECTIONS[section].model_fields[field_name]
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "note" in extra and layers.values[key] != field.default:
            notes.append(f"{origin}: {key} {extra['note']}")
    if config.DATA.in_chans == 3 and len(config.DATA.mean) == 1:
        where = layers.origins["DATA.mean"]
        notes.append(
            f"{where}: DATA.mean has one value, which serves all 3 channels; for grayscale images"
            " set DATA.grayscale: true"
        )
    return notes


def _not_found(
    path: Path, name: str, presets: Sequence[str], kind: str, command: tuple[str, str]
) -> str:
    nearest = nearest_name(name, presets)
    mend = (
        "`sanctl config list` shows the presets"
        if kind == "model"
        else f"`sanctl config new {' '.join(command)}` writes one for your own dataset"
    )
    return f"{path}: no such file, and no preset for the {kind} {name}{nearest or f'; {mend}'}"
