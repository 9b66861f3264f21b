"""Indexes, packs and text files that somebody hands over to do harm."""

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bad_images import PNG
from hostile_checkpoints import HUGE, Calls, Make, laughs, saved, touch
from torch_archives import archive, mapping, nested, number, numbers, pickled, tensor, text

SECRET = "outside/secret.png"
"""A whole image beside the folder of the hostile file, which nobody has allowed to be read."""

_INDEX: dict[str, Any] = {"classes": ["a"], "class_to_idx": {"a": 0}, "samples": [("a/0.png", 0)]}
_PACK: dict[str, Any] = {
    "format": "sanctl.packed_images",
    "version": 1,
    "classes": ["a"],
    "data": torch.from_numpy(np.frombuffer(PNG, np.uint8).copy()),
    "offsets": torch.tensor([0, len(PNG)]),
    "targets": torch.tensor([0]),
    "names": torch.tensor([97], dtype=torch.uint8),
    "name_offsets": torch.tensor([0, 1]),
}


def index(**changes: Any) -> Make:
    return lambda _: saved(_INDEX | changes)


def pack(**changes: Any) -> Make:
    return lambda _: saved(_PACK | changes)


def listing(*paths: str) -> Make:
    """An index of these paths, in which {beside} stands for the folder above the index."""
    return lambda folder: saved(
        _INDEX | {"samples": [(path.replace("{beside}", str(folder.parent)), 0) for path in paths]}
    )


def codes(**values: bytes) -> Make:
    return lambda _: archive(mapping(**values))


OUTSIDE: dict[str, Make] = {
    "climbs out by ..": listing("a/0.png", f"../{SECRET}"),
    "climbs out behind a folder": listing(f"a/../../{SECRET}"),
    "has an absolute path": listing(f"{{beside}}/{SECRET}"),
    "has an absolute path that climbs": listing(f"{{beside}}/x/../{SECRET}"),
    "has a path of the system": listing("/etc/passwd"),
    "has a path for the terminal": listing("../\x1b]0;owned\x07\x1b[2J\n.png"),
    "has a path of a megabyte": listing("/" + "x" * 10**6),
}
INDEXES: dict[str, Make] = OUTSIDE | {
    "runs a command": lambda folder: saved(_INDEX | {"samples": touch(folder)}),
    "opens a file to write": lambda folder: saved(Calls(open, str(folder / "executed"), "w")),
    "has lists in lists": codes(classes=b"]" * 10**6 + b"a" * (10**6 - 1), samples=b"]"),
    "has a class nested a million deep": codes(classes=b"]" + nested(10**6) + b"a", samples=b"]"),
    "laughs": index(samples=laughs()),
    "has a tensor for samples": index(samples=torch.zeros(2, 2)),
    "has a tensor for numbers": index(class_to_idx={"a": torch.zeros(2)}),
    "has a class number of 5,000 digits": index(samples=[("a/0.png", 10**5000)]),
    "has a negative class number": index(samples=[("a/0.png", -1)]),
    "has a class twice": index(classes=["a", "a"]),
    "is a zip bomb": lambda _: archive(
        mapping(classes=b"]" + text("a" * 10**7) + b"a", samples=b"]"), compressed=True
    ),
}
PACKS: dict[str, Make] = {
    "runs a command": lambda folder: saved(_PACK | {"classes": touch(folder)}),
    "is old and runs a command": lambda folder: pickle.dumps([(touch(folder), 0)]),
    "is old in a zip and runs a command": lambda folder: saved([(touch(folder), 0)]),
    "has offsets beyond its data": pack(offsets=torch.tensor([0, HUGE])),
    "has negative offsets": pack(
        offsets=torch.tensor([0, -5, len(PNG)]),
        targets=torch.tensor([0, 0]),
        name_offsets=torch.tensor([0, 0, 1]),
    ),
    "has targets that repeat a trillion times": codes(
        format=text("sanctl.packed_images"),
        version=number(1),
        classes=b"]" + text("a") + b"a",
        targets=tensor(storage="LongStorage", held=2, size=(HUGE,), stride=(0,)),
    ),
    "has a version of 5,000 digits": pack(version=10**5000),
    "has a version that is a tensor": pack(version=torch.zeros(2)),
    "has a format that is a tensor": pack(format=torch.zeros(2)),
    "has no class for a target": pack(targets=torch.tensor([7])),
    "is old and claims 2 GB": lambda _: b"\x80\x05B" + struct.pack("<I", 2**31 - 1),
    "is old with a memo of 4 billion": lambda _: (
        b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b"."
    ),
    "is old with a key nested a million deep": lambda _: pickled(b"}" + nested(10**6) + b"Ns"),
    "is old with a set nested a million deep": lambda _: (
        b"\x80\x04\x8f(" + nested(10**6) + b"\x90."
    ),
    "is old with bytes for images": lambda _: pickle.dumps([(b"x", 0)]),
    "is old and compressed": lambda _: archive(b"]" + numbers(1) + b"a", compressed=True),
}
CLASSES = b"a\t0\nb\t1\nc\t2\n"
TEXTS: dict[str, tuple[bytes, bytes]] = {
    "has an absolute path": (f"{{beside}}/{SECRET}\t0\n".encode(), CLASSES),
    "climbs out by ..": (f"x/../../{SECRET}\t0\n".encode(), CLASSES),
    "has a class number of 5,000 digits": (b"a.png\t" + b"9" * 5000 + b"\n", CLASSES),
    "has escapes for the terminal": (b"\x1b]0;owned\x07 x\n", CLASSES),
    "is no text": (b"\xff\xfe\t0\n", CLASSES),
    "has a class for the terminal": (b"a.png\t0\n", b"\x1b]0;owned\x07\t0\na\t0\n"),
}
"""A train.txt, in which {beside} is the folder above it, and a mapping.txt."""
TEXT_CONFIG = "DATA: {data_root: ., classes: 3}\nTRAIN:\n  model: resnet26\n"


def write_texts(folder: Path, train: bytes, classes: bytes) -> None:
    """Write a dataset of text files, and the configuration `d n` that names it."""
    config = folder / "config" / "d" / "d_n.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(TEXT_CONFIG)
    for part in ("train", "val"):
        lines = train.replace(b"{beside}", str(folder.parent).encode())
        (folder / f"{part}.txt").write_bytes(lines)
    (folder / "mapping.txt").write_bytes(classes)
