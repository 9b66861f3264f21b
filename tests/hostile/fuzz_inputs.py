"""Whole files of every kind, what damages them, and the readers that must stand it.

A damaged file gives a right result or a SanctlError; nothing else is raised, nothing is written.
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from sanctl.config.load import load_config
from sanctl.config.presets import compose
from sanctl.data.decode import decode_image
from sanctl.data.index import ImageIndex, load_index, save_index
from sanctl.data.packed import open_packed
from sanctl.data.txt_mappings import load_txt_mappings
from sanctl.engine.checkpoint import Checkpoint, load_checkpoint
from sanctl.errors import SanctlError

Splice = tuple[float, int, bytes]
"""Where (as a share of the length), how many bytes are removed there, and what is put in place."""


@dataclass(frozen=True)
class Reader:
    """How files of one kind are read, and some whole ones."""

    name: str
    read: Callable[[Path], object]
    whole: Callable[[Path], list[bytes]]


def damaged(data: bytes, splices: list[Splice], kept: float) -> bytes:
    """Apply splices to bytes, then cut them."""
    for share, removed, inserted in splices:
        at = int(share * len(data))
        data = data[:at] + inserted + data[at + removed :]
    return data[: round(kept * len(data))]


def damaged_inside(data: bytes, which: int, splices: list[Splice], kept: float) -> bytes:
    """As `damaged`, but of one member of a zip archive, whose checksums are right again.

    Otherwise the checksums alone would refuse nearly every archive.
    """
    if not data.startswith(b"PK"):
        return damaged(data, splices, kept)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        members = old.infolist()
        # The first is the pickle, which is what there is most to say about.
        chosen = members[which % len(members)] if which % 3 == 0 else members[0]
        for member in members:
            content = old.read(member)
            new.writestr(member, damaged(content, splices, kept) if member is chosen else content)
    return buffer.getvalue()


# Opcodes of pickles, numbers at the limits, and letters that YAML and headers care about.
_TOKENS = [b"\x80\x02", b"(", b"t", b"R", b"b", b".", b"}", b"]", b"\x85", b"q\x00", b"Q", b"s"]
_TOKENS += [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\x00", b"PK\x03\x04"]
_TOKENS += [b"&a ", b"*a", b"!!", b"{", b"[", b": ", b"\t", b"\n", b"-1", b"9" * 30, b"../", b"/"]
pieces = st.one_of(st.just(b""), st.binary(max_size=6), st.sampled_from(_TOKENS))
splices = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.integers(0, 4), st.integers(0, 300)),
        pieces,
    ),
    min_size=1,
    max_size=4,
)
kept = st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1))


def outcome(reader: Reader, data: bytes, folder: Path) -> str:
    """Read damaged bytes; return "read" or "refused".

    Raises:
        AssertionError: A file was written.
    """
    path = folder / "file"
    path.write_bytes(data)
    try:
        reader.read(path)
        said = "read"
    except SanctlError:
        said = "refused"
    assert [entry.name for entry in folder.iterdir()] == ["file"]
    return said


def _index_files(folder: Path) -> list[bytes]:
    index = ImageIndex(["ant", "bee"], [("ant/0.png", 0), ("bee/1.png", 1), ("ant/2.png", 0)])
    save_index(index, folder / "x_init.pt")
    return [(folder / "x_init.pt").read_bytes()]


@cache
def images() -> tuple[bytes, ...]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 44, 3), np.uint8))
    encoded = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "GIF"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        encoded.append(buffer.getvalue())
    return tuple(encoded)


def _pack_files(folder: Path) -> list[bytes]:
    from sanctl.data.pack import pack_index

    (folder / "a.png").write_bytes(images()[0])
    index = ImageIndex(["ant"], [("a.png", 0), ("a.png", 0)])
    pack_index(index, folder, folder / "x_imgs.pt", workers=0)
    return [(folder / "x_imgs.pt").read_bytes()]


def _old_pack_files(_: Path) -> list[bytes]:
    content = {
        "classes": ["ant"],
        "class_to_idx": {"ant": 0},
        "samples": [(io.BytesIO(images()[0]), 0), (io.BytesIO(b"x"), 0)],
    }
    whole = [pickle.dumps(content, protocol) for protocol in (2, 3, 5)]
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        whole.append(buffer.getvalue())
    return whole


def _checkpoint_files(folder: Path) -> list[bytes]:
    whole = []
    weights = {"module.fc.weight": torch.ones(2, 3), "module.fc.bias": torch.zeros(2)}
    Checkpoint(weights, epoch=3, scores={"top1_val": 50.0}, config={"DATA": {"classes": 2}}).save(
        folder / "x.pth"
    )
    whole.append((folder / "x.pth").read_bytes())
    published = {"epoch": 3, "state_dict": weights, "top1_val": np.float64(50.0)}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(published, buffer, _use_new_zipfile_serialization=zipped)
        whole.append(buffer.getvalue())
    return whole


def _read_pack(path: Path) -> object:
    pack = open_packed(path)
    return [(pack.name(index), bytes(pack.read(index))) for index in range(len(pack))]


def _read_texts(path: Path) -> object:
    """One file serves for both, since only its content matters."""
    folder = path.parent
    for name in ("train.txt", "mapping.txt"):
        (folder / name).symlink_to(path)
    try:
        return load_txt_mappings(folder, "train")
    finally:
        for name in ("train.txt", "mapping.txt"):
            (folder / name).unlink()


def _read_image(path: Path) -> object:
    pixels = decode_image(path.read_bytes(), 3, "x")
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    return pixels


READERS = [
    Reader("index", load_index, _index_files),
    Reader("pack", _read_pack, _pack_files),
    Reader("legacy pack", _read_pack, _old_pack_files),
    Reader("checkpoint", load_checkpoint, _checkpoint_files),
    Reader("YAML config", load_config, lambda _: [compose("mnist", "san_tiny").encode()]),
    Reader("txt mappings", _read_texts, lambda _: [b"ant\t0\nbee\t1\ncow fly\t2\n"]),
    Reader("image", _read_image, lambda _: list(images())),
]
