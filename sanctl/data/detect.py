"""What a dataset on disk is: how it is stored, how many classes, gray or colour."""

from pathlib import Path

import numpy as np

from sanctl.config.schema import DataConfig
from sanctl.data.decode import ImageError, decode_image
from sanctl.data.index import load_index
from sanctl.data.packed import open_packed
from sanctl.data.source import ImageSource, open_source
from sanctl.data.txt_mappings import load_txt_mappings

# Of each kind of storage the parts that training needs, the fastest kind first.
_PARTS = {
    "byte_imgs": ("train_imgs.pt", "val_imgs.pt"),
    "preprocessed_paths": ("train_init.pt", "val_init.pt"),
    "image_folder": ("train", "val"),
    "txt_mappings": ("train.txt", "val.txt", "mapping.txt"),
}
_LOOKED_AT = 64


def detect_storage(root: Path) -> str | None:
    """Return the dataset_init that fits a dataset's folder, or None where none does."""
    for kind, parts in _PARTS.items():
        if all((root / part).exists() for part in parts):
            return kind
    return None


def count_classes(root: Path, kind: str) -> int:
    """Return how many classes the training images of a dataset have.

    Args:
        root: The dataset's folder.
        kind: Its dataset_init.

    Raises:
        UserError: The file that says so cannot be read.
    """
    if kind == "byte_imgs":
        return len(open_packed(root / "train_imgs.pt").classes)
    if kind == "preprocessed_paths":
        return len(load_index(root / "train_init.pt").classes)
    if kind == "txt_mappings":
        return len(load_txt_mappings(root, "train").classes)
    return sum(entry.is_dir() for entry in (root / "train").iterdir())


def looks_grayscale(root: Path, kind: str, classes: int, allow_outside: bool = False) -> bool:
    """Return whether training images, looked at here and there, are all without colour.

    Raises:
        UserError: The training images cannot be opened.
    """
    data = DataConfig.model_validate(
        {
            "data_root": str(root),
            "dataset_init": kind,
            "classes": classes,
            "allow_outside": allow_outside,
        }
    )
    source = open_source(data, "train")
    chosen = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int))
    return all(_is_gray(source, int(index)) for index in chosen)


def _is_gray(source: ImageSource, index: int) -> bool:
    """Return whether red, green and blue agree; an image that cannot be read says nothing."""
    try:
        name = source.name(index)
        image = decode_image(source.read(index), 3, name)
    except ImageError:
        return True
    return bool((image == image[:, :, :1]).all())
