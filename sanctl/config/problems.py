"""What is wrong with a configuration, in words: unknown keys, wrong types, values out of range."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sanctl.config.schema import KEYS, SECTIONS
from sanctl.errors import shown

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} value(s)",
    "too_long": "at most {max_length} value(s)",
    "value_error": "text without control characters",
    "literal_error": "one of {expected}",
}


def unknown_section(name: str) -> str:
    """Say that a top-level key is no section, with the nearest section or key."""
    return f"{name}: unknown section{_did_you_mean(_nearest(name, SECTIONS) or _key_named(name))}"


def unknown_key(section: str, key: str) -> str:
    """Say that a section has no such key, with the nearest key of this or another section."""
    own = SECTIONS[section].model_fields
    nearest = _key_named(key)
    if nearest is None and (near := _nearest(key, own)):
        nearest = f"{section}.{near}"
    if nearest is None:
        everywhere = [name.partition(".")[2] for name in KEYS]
        nearest = _key_named(_nearest(key, everywhere) or "")
    return f"{section}.{key}: unknown key{_did_you_mean(nearest)}"


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return `, did you mean X?` for the most similar of the names, or nothing."""
    return _did_you_mean(_nearest(name, names))


def field_problems(error: ValidationError) -> list[tuple[str, str]]:
    """Turn pydantic's findings into (key, message) pairs, in the order of the keys."""
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"][:2])
        found.setdefault(key, f"{_place(detail['loc'])}: {_describe(detail)}")
    return list(found.items())


def _describe(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "missing, and it has no default"
    expected = _EXPECTED.get(detail["type"])
    if expected is None:
        return f"{detail['msg']}, got {shown(detail['input'])}"
    return f"expected {expected.format(**detail.get('ctx', {}))}, got {shown(detail['input'])}"


def _place(location: tuple[int | str, ...]) -> str:
    """Write ("TRAIN", "kernels", 2) as `TRAIN.kernels[2]`."""
    place = ".".join(str(part) for part in location[:2])
    indices = [part for part in location[2:] if isinstance(part, int)]
    return place + "".join(f"[{index}]" for index in indices)


def _key_named(name: str) -> str | None:
    """Find the full name of a key that some section has under this name, in whatever case."""
    matches = [key for key in KEYS if key.partition(".")[2].lower() == name.lower()]
    return matches[0] if matches else None


def _nearest(name: str, names: Iterable[str]) -> str | None:
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def _did_you_mean(nearest: str | None) -> str:
    return f", did you mean {nearest}?" if nearest else ""
