"""The layers a configuration is made of: values by key, and where each value came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sanctl.config.document import Document, parse_value
from sanctl.config.problems import unknown_key, unknown_section
from sanctl.config.schema import SECTIONS
from sanctl.errors import UserError, shown

_LONGEST_KEY = 80


@dataclass
class Layers:
    """Values by full key (`TRAIN.epochs`), later layers over earlier ones.

    Attributes:
        source: What the whole is called in messages about keys that no layer gives.
        values: The values given; keys left empty are not among them.
        origins: Where each value came from: `config/x.yaml:12`, `override`, ...
        problems: What was wrong so far, one line each.
    """

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add_document(self, document: Document, source: str) -> None:
        """Lay a file's values over what is there, each with its line."""
        self.add_mapping(
            document.values, {name: f"{source}:{line}" for name, line in document.lines.items()}
        )

    def add_mapping(self, sections: Mapping[Any, Any], places: Mapping[str, str]) -> None:
        """Lay nested values over what is there; `places` says where sections and keys stand."""
        for section, body in sections.items():
            where = places.get(_name(section), self.source)
            if section not in SECTIONS:
                self.problems.append(f"{where}: {unknown_section(_name(section))}")
            elif isinstance(body, Mapping):
                for key, value in body.items():
                    name = _name(key)
                    self._set(section, name, value, places.get(f"{section}.{name}", where))
            elif body is not None:
                self.problems.append(
                    f"{where}: {section}: expected keys below it, got {shown(body)}"
                )

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """Lay `SECTION.key=value` settings of the command line over what is there.

        Raises:
            UserError: A setting has no `=`, or its value is not plain YAML.
        """
        for override in overrides:
            name, equals, text = override.partition("=")
            section, _, key = name.strip().partition(".")
            if not equals:
                raise UserError(f"override {override}: expected KEY=VALUE, e.g. TRAIN.epochs=3")
            value = parse_value(text, f"override {override}")
            if section in SECTIONS and key:
                self._set(section, key, value, "override")
            else:
                self.problems.append(f"override: {unknown_section(name.strip())}")

    def nested(self, without: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
        """Return the values by section and key, as the schema takes them."""
        sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for name, value in self.values.items():
            if name not in without:
                section, _, key = name.partition(".")
                sections[section][key] = value
        return sections

    def _set(self, section: str, key: str, value: Any, where: str) -> None:
        name = f"{section}.{key}"
        if key not in SECTIONS[section].model_fields:
            self.problems.append(f"{where}: {unknown_key(section, key)}")
        elif value is None or value == "":
            # An empty value means "not set": the default holds, whatever a lower layer said.
            self.values.pop(name, None)
            self.origins.pop(name, None)
        else:
            self.values[name] = value
            self.origins[name] = where


def _name(key: Any) -> str:
    """Return a key as text; one out of a hostile file may be of any kind and length."""
    return key if isinstance(key, str) and len(key) <= _LONGEST_KEY else shown(key)
