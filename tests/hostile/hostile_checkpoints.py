"""Checkpoints that somebody hands over to do harm; each is made of its folder's path."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch_archives import archive, call, mapping, nested, number, stream, tensor, text

MARKER = "executed"
HUGE = 10**12

Make = Callable[[Path], bytes]


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def touch(folder: Path) -> Calls:
    """What would leave a marker if it were executed."""
    return Calls(os.system, f"touch {folder / MARKER}")


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def laughs(levels: int = 40) -> Any:
    """Lists of ten lists of ten lists ...: few bytes, and 10 to the 40th values."""
    value: Any = "ha"
    for _ in range(levels):
        value = [value] * 10
    return value


def ours(**fields: object) -> Make:
    """A checkpoint of sanctl, with these fields."""
    return lambda _: saved({"state_dict": {"w": torch.zeros(4)}, "format": 1} | fields)


def config(**train: object) -> dict[str, object]:
    keys: dict[str, object] = {"model": "resnet26"}
    return {"DATA": {"data_root": ".", "classes": 2}, "TRAIN": keys | train}


def with_tensor(**wrong: Any) -> Make:
    return lambda _: archive(mapping(state_dict=mapping(v=tensor(**wrong))))


def older_tensor(**wrong: Any) -> Make:
    return lambda _: stream(mapping(state_dict=mapping(v=tensor(older=True, **wrong))))


def calling(name: str, *arguments: bytes) -> Make:
    return lambda _: archive(mapping(state_dict=mapping(w=tensor()), x=call(name, *arguments)))


EXECUTING: dict[str, Make] = {
    "runs a command": lambda folder: saved({"state_dict": touch(folder)}),
    "is a plain pickle that runs a command": lambda folder: pickle.dumps(touch(folder)),
    "is of the older kind and runs a command": lambda folder: stream(
        call("os system", text(f"touch {folder / MARKER}"))
    ),
    "opens a file to write": lambda folder: saved(Calls(open, str(folder / MARKER), "w")),
    "evaluates code in numpy's name": calling(
        "numpy.testing._private.utils runstring", text("open('executed', 'w')"), b"}"
    ),
}
DECLARING: dict[str, Make] = {
    "has a tensor of a trillion elements": with_tensor(size=(HUGE,)),
    "has a storage of a trillion elements": with_tensor(held=HUGE, size=(HUGE,)),
    "has a tensor that starts before its data": with_tensor(offset=-5),
    "has a tensor that starts behind its data": with_tensor(offset=HUGE),
    "has a tensor of a negative size": with_tensor(size=(-4,)),
    "has a tensor that repeats one element": with_tensor(size=(HUGE,), stride=(0,)),
    "is old with a tensor of a trillion elements": older_tensor(size=(HUGE,)),
    "is old with a tensor of four billion elements": older_tensor(size=(4 * 10**9,)),
    "is old with a storage of a trillion elements": older_tensor(held=HUGE),
    "is old with a tensor that starts before its data": older_tensor(offset=-5),
    "allocates 100 GB of bytes": calling("builtins bytearray", number(10**11)),
    "allocates 100 GB of numbers": calling("torch FloatTensor", number(25 * 10**9)),
    "is old and allocates 100 GB": lambda _: stream(call("__builtin__ bytearray", number(10**11))),
    "has a scalar of 2 GB": calling(
        "numpy.core.multiarray scalar", call("numpy dtype", text("V2000000000"), b"\x89", b"\x88")
    ),
    "is a zip bomb": lambda _: archive(
        mapping(state_dict=mapping(w=tensor(held=25 * 10**6, size=(25 * 10**6,)))),
        {"0": bytes(10**8)},
        compressed=True,
    ),
    "is of meta tensors": ours(state_dict={"w": torch.zeros(HUGE, device="meta")}),
    "is of sparse tensors": ours(state_dict={"w": torch.zeros(4).to_sparse()}),
}
CONTENTS: dict[str, Make] = {
    "has a key nested a million deep": lambda _: archive(b"}" + nested(10**6) + b"Ns"),
    "has a value nested a million deep": lambda _: archive(mapping(format=nested(10**6))),
    "has lists in lists a million deep": lambda _: archive(
        mapping(state_dict=b"]" * 10**6 + b"a" * (10**6 - 1))
    ),
    "has no weights": ours(state_dict={}),
    "is a list": lambda _: saved([1, 2, 3]),
    "has text for weights": ours(state_dict={"w": "text"}),
    "has a format of 5,000 digits": ours(format=10**5000),
    "has a format that is a tensor": ours(format=torch.zeros(3)),
    "has a format for the terminal": ours(format="\x1b]0;owned\x07\x1b[2J\nerror: none"),
    "has an epoch of text": ours(epoch="1"),
    "has classes for the terminal": ours(classes=["\x1b]0;owned\x07", 7]),
    "has a configuration that laughs": ours(config=config(kernels=laughs())),
    "has a section that laughs": ours(config=config() | {"TEST": laughs()}),
    "has a key that laughs": ours(config=config() | {"DISTRIBUTED": laughs()}),
    "writes its results where it wants": lambda folder: saved(
        {
            "state_dict": {"w": torch.zeros(4)},
            "format": 1,
            "config": config(save_path=str(folder.parent / "outside" / "run")),
        }
    ),
}
CHECKPOINTS = EXECUTING | DECLARING | CONTENTS
