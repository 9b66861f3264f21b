"""Values -> a complete configuration file with a comment above every key."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from sanctl.config.schema import SECTIONS

_WIDTH = 98


def render(values: Mapping[str, Any], titles: Sequence[str] = ()) -> str:
    """Write a complete configuration file.

    Args:
        values: Values by full key (`TRAIN.epochs`); the others get their defaults, and keys
            whose default follows another key are left empty.
        titles: Lines for the head of the file.

    Returns:
        YAML with every section and every key that has an effect, each below its comment.
    """
    lines = [f"# {title}" for title in titles]
    lines += [
        "# Every key below has its comment; an empty value means the default.",
    ]
    for section, model in SECTIONS.items():
        lines += ["", *_comment(model.__doc__ or "", ""), f"{section}:"]
        for key, field in model.model_fields.items():
            name = f"{section}.{key}"
            if not _extra(field, "note"):
                lines += _comment(describe(field), "  ")
                lines.append(f"  {key}: {format_value(values.get(name, _default(field)))}".rstrip())
    return "\n".join(lines) + "\n"


def describe(field: FieldInfo) -> str:
    """Return what a key does, its unit and its choices, in words."""
    choices = _choices(field.annotation)
    text = field.description or ""
    # Names are listed only where the text does not explain them one by one already.
    if choices and not all(str(choice) in text for choice in choices):
        text = f"{text} One of {', '.join(str(choice) for choice in choices)}."
    return text


def format_value(value: Any) -> str:
    """Write one value as it would stand in a file; nothing for a value that is not set."""
    if value is None:
        return ""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() or _extra(field, "follows") else field.default


def _extra(field: FieldInfo, name: str) -> bool:
    return isinstance(field.json_schema_extra, dict) and name in field.json_schema_extra


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
    )
