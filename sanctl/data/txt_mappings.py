"""Datasets described by text files: `train.txt`, `val.txt` or `test.txt`, and `mapping.txt`.

A line of a split is `path<TAB>class index`, one of the mapping `class name<TAB>class index`.
"""

from collections.abc import Iterator
from pathlib import Path

from sanctl.data.index import ImageIndex, is_file
from sanctl.errors import UserError

_MOST_DIGITS = 12


def load_txt_mappings(root: Path, split: str) -> ImageIndex:
    """Read `{split}.txt` and `mapping.txt` of a folder.

    Raises:
        UserError: A file is missing, a line is not `text<TAB>number`, an index is given to two
            classes, left out, or not in the mapping.
    """
    mapping = root / "mapping.txt"
    by_index: dict[int, str] = {}
    for number, name, label in _lines(mapping):
        if label in by_index:
            raise UserError(
                f"{mapping}, line {number}: index {label} is already that of {by_index[label]}"
            )
        by_index[label] = name
    if sorted(by_index) != list(range(len(by_index))):
        raise UserError(f"{mapping}: its indices must be 0 to {len(by_index) - 1} without a gap")
    path = root / f"{split}.txt"
    samples = []
    for number, name, label in _lines(path):
        if label not in by_index:
            raise UserError(f"{path}, line {number}: class index {label} is not in {mapping}")
        samples.append((name, label))
    extensions = sorted({Path(name).suffix.lower() for name, _ in samples})
    classes = [by_index[label] for label in range(len(by_index))]
    return ImageIndex(classes, samples, tuple(extensions), _find_root(samples, root))


def _find_root(samples: list[tuple[str, int]], folder: Path) -> Path:
    """The folder that paths start from: that of the files, or else the current one."""
    from_here = any(is_file(Path(name)) for name, _ in samples[:1])
    return Path() if from_here and not is_file(folder / samples[0][0]) else folder


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yield line number, text and index of every line that is not empty."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); dataset_init txt_mappings needs it"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        text, _, label = line.rstrip("\r").rpartition("\t")
        if not line.strip():
            continue
        if not text or not label.strip().isdecimal() or len(label) > _MOST_DIGITS:
            raise UserError(
                f"{path}, line {number}: must be text, a tab and an index, not {line[:60]!r}"
            )
        yield number, text, int(label)
