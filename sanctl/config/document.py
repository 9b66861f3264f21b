"""YAML text -> plain values, each with the line it stands on.

Only the safe part of YAML is read: tags that would make objects are refused, as are duplicate
keys (YAML parsers silently keep the last) and documents that aliases blow up.
"""

from dataclasses import dataclass
from typing import Any

import yaml

from sanctl.errors import UserError

_MOST_VALUES = 10_000


@dataclass(frozen=True)
class Document:
    """The values of one file and where they stand.

    Attributes:
        values: Sections and keys as the file gives them.
        lines: Line (from 1) of each section (`TRAIN`) and key (`TRAIN.epochs`).
    """

    values: dict[Any, Any]
    lines: dict[str, int]


def parse_document(text: str, source: str) -> Document:
    """Read a configuration's YAML.

    Args:
        text: The YAML.
        source: What to call it in messages, for example the file's path.

    Returns:
        The values with their lines.

    Raises:
        UserError: The text is not one plain YAML mapping; the message has source and line.
    """
    try:
        return _parse(text, source)
    except yaml.reader.ReaderError as error:
        raise UserError(f"{source}: not a text file ({error.reason})") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax_message(error, text, source)) from error
    except (RecursionError, ValueError, TypeError) as error:
        # ValueError: a date like 2020-99-99; TypeError: a list as a key.
        raise UserError(f"{source}: cannot be read as YAML ({error})") from error


def parse_value(text: str, source: str) -> Any:
    """Read one value as YAML would (`3`, `[3, 7]`, `true`, `1e-4`).

    Raises:
        UserError: The text is not a plain YAML value.
    """
    return parse_document(f"value: {text}", source).values["value"]


def _parse(text: str, source: str) -> Document:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{source}: empty; `sanctl config new` writes a complete file")
        if not isinstance(node, yaml.MappingNode):
            found = "list" if isinstance(node, yaml.SequenceNode) else "single value"
            raise UserError(
                f"{source}:{_line(node)}: expected sections (DATA:, TRAIN:, ...), not a {found}"
            )
        _refuse_expansion(node, source)
        _refuse_duplicates(node, source)
        values = loader.construct_document(node)
        return Document(values, _key_lines(node))
    finally:
        loader.dispose()


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_message(error: yaml.MarkedYAMLError, text: str, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f"{source}: {error.problem}"
    where = f"{source}:{mark.line + 1}"
    if text[mark.index : mark.index + 1] == "\t":
        return f"{where}: a tab character; indent with spaces"
    if isinstance(error, yaml.constructor.ConstructorError):
        return f"{where}: {error.problem}; only plain values are read"
    return f"{where}: not valid YAML: {error.problem or error.context}"


def _refuse_expansion(root: yaml.Node, source: str) -> None:
    """Refuse a document whose aliases repeat values without bound, or contain themselves."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise UserError(f"{source}:{_line(node)}: an alias that contains itself")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            open_nodes.remove(id(node))
        return sizes[id(node)]

    if size(root) > _MOST_VALUES:
        raise UserError(f"{source}: more than {_MOST_VALUES} values; not a configuration")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _refuse_duplicates(root: yaml.MappingNode, source: str) -> None:
    mappings: list[tuple[str, yaml.MappingNode]] = [("", root)]
    mappings += [
        (f"{key.value}.", value) for key, value in root.value if isinstance(value, yaml.MappingNode)
    ]
    repeated = []
    for prefix, mapping in mappings:
        first: dict[Any, int] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode) and key.value in first:
                repeated.append(
                    f"{source}:{_line(key)}: {prefix}{key.value}: given twice, first on line"
                    f" {first[key.value]}"
                )
            elif isinstance(key, yaml.ScalarNode):
                first[key.value] = _line(key)
    if repeated:
        raise UserError("\n".join(repeated))


def _key_lines(root: yaml.MappingNode) -> dict[str, int]:
    lines = {}
    for section, body in root.value:
        lines[str(section.value)] = _line(section)
        if isinstance(body, yaml.MappingNode):
            for key, _ in body.value:
                lines[f"{section.value}.{key.value}"] = _line(key)
    return lines
