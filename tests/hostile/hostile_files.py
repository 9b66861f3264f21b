"""All files that somebody hands over to do harm, with the commands that open them."""

from collections.abc import Callable
from pathlib import Path

from hostile_checkpoints import CHECKPOINTS, MARKER, Make, saved
from hostile_data import INDEXES, OUTSIDE, PACKS, SECRET, TEXTS, listing, write_texts

Maker = Callable[[Path], list[str]]
"""Writes into a folder and returns the arguments of `sanctl`."""

_HEAD = "DATA: {data_root: d, classes: 2}\nTRAIN:\n  arch: resnet\n  layers: [1, 1, 1, 1]\n"
_LAUGHS = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 12))
YAMLS: dict[str, str | bytes] = {
    "has a tag that runs a command": f"{_HEAD}  weight: !!python/object/apply:os.system [MARK]\n",
    "has a tag that makes an object": f"{_HEAD}  weight: !!python/object/new:pathlib.Path [x]\n",
    "has a tag that imports": f"{_HEAD}  weight: !!python/module:antigravity\n",
    "laughs": f"b0: &b0 [ha]\n{_LAUGHS}{_HEAD}",
    "contains itself": "DATA: &d {data_root: *d}\n",
    "is nested a hundred thousand deep": "DATA: " + "[" * 100_000,
    "has mappings nested deep": "DATA: " + "{a: " * 20_000,
    "is no text": b"DATA:\n  data_root: \xff\xfe\n",
    "has zero bytes": b"DATA:\0\n",
    "has not a number": f"{_HEAD}  base_lr: .nan\n",
    "has infinity": f"{_HEAD}  base_lr: .inf\n",
    "has infinity as text": f"{_HEAD}  weight_decay: 1e999\n",
    "has a number of 5,000 digits": f"{_HEAD}  epochs: {'9' * 5000}\n",
    "has a trillion blocks": _HEAD.replace("[1, 1, 1, 1]", "[1, 1, 1, 1000000000000]"),
    "has a trillion classes": _HEAD.replace("classes: 2", "classes: 1000000000000"),
    "has a million workers": f"{_HEAD}  workers: 1000000\n",
    "has a key for the terminal": f'{_HEAD}  "\\e]0;owned\\a\\e[2J": 1\n',
    "has a path for the terminal": f'{_HEAD}  weight: "\\e]0;owned\\a"\n',
    "has half a character": f'{_HEAD}  weight: "\\ud800"\n',
    "has a key of 1,000 characters": f"{_HEAD}  {'x' * 1000}: 1\n",
}


def _checkpoint(make: Make) -> Maker:
    def write(folder: Path) -> list[str]:
        (folder / "evil.pth").write_bytes(make(folder))
        return ["test", "--checkpoint", "evil.pth"]

    return write


def _index(make: Make, command: str) -> Maker:
    def write(folder: Path) -> list[str]:
        (folder / "train_init.pt").write_bytes(make(folder))
        return ["dataset", command, "."]

    return write


def _pack(make: Make) -> Maker:
    def write(folder: Path) -> list[str]:
        (folder / "train_imgs.pt").write_bytes(make(folder))
        return ["dataset", "check", "train_imgs.pt"]

    return write


def _yaml(content: str | bytes) -> Maker:
    def write(folder: Path) -> list[str]:
        data = content.encode() if isinstance(content, str) else content
        command = f"touch {folder / MARKER}".encode()
        (folder / "evil.yaml").write_bytes(data.replace(b"MARK", command))
        return ["config", "check", "evil.yaml"]

    return write


def _text(train: bytes, classes: bytes) -> Maker:
    def write(folder: Path) -> list[str]:
        write_texts(folder, train, classes)
        return ["train", "d", "n", "-o", "DATA.dataset_init=txt_mappings"]

    return write


def _training_outside(folder: Path) -> list[str]:
    write_texts(folder, b"", b"")
    (folder / "train_init.pt").write_bytes(listing(f"../{SECRET}")(folder))
    return ["train", "d", "n", "-o", "DATA.dataset_init=preprocessed_paths"]


def _consenting_checkpoint(folder: Path) -> list[str]:
    """A checkpoint whose configuration allows what the user has not."""
    import torch

    data = {"data_root": ".", "dataset_init": "preprocessed_paths", "allow_outside": True}
    config = {"DATA": data | {"classes": 2}, "TRAIN": {"model": "resnet26"}}
    weights = {"w": torch.zeros(4)}
    (folder / "val_init.pt").write_bytes(listing(f"../{SECRET}")(folder))
    (folder / "evil.pth").write_bytes(saved({"state_dict": weights, "format": 1, "config": config}))
    return ["test", "--checkpoint", "evil.pth"]


MAKERS: dict[str, Maker] = {
    **{f"a checkpoint that {name}": _checkpoint(make) for name, make in CHECKPOINTS.items()},
    **{f"an index that {name}": _index(make, "check") for name, make in INDEXES.items()},
    **{
        f"an index for {command} that {name}": _index(make, command)
        for command in ("pack", "stats")
        for name, make in list(OUTSIDE.items())[:3]
    },
    **{f"a pack that {name}": _pack(make) for name, make in PACKS.items()},
    **{f"a YAML file that {name}": _yaml(content) for name, content in YAMLS.items()},
    **{f"a text file that {name}": _text(*files) for name, files in TEXTS.items()},
    "an index for training that climbs out": _training_outside,
    "a checkpoint that allows an index to climb out": _consenting_checkpoint,
}
