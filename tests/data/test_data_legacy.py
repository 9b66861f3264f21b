import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sanctl.data.legacy import read_old_pack
from sanctl.data.packed import open_packed
from sanctl.errors import UserError

IMAGES = [b"\xff\xd8 first \x00\x80", b"second", b"", bytes(range(256))]
TARGETS = [1, 0, 0, 2]
CLASSES = ["cat", "dog", "owl"]

Save = Callable[[Any, Path], None]


def save_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_old_torch(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(protocol: int) -> Save:
    def save(content: Any, path: Path) -> None:
        path.write_bytes(pickle.dumps(content, protocol))

    return save


SAVES: dict[str, Save] = {
    "zip": save_zip,
    "old torch": save_old_torch,
    **{f"pickle {protocol}": save_pickle(protocol) for protocol in (2, 3, 4, 5)},
}


@pytest.fixture(params=list(SAVES.values()), ids=list(SAVES))
def save(request: pytest.FixtureRequest) -> Save:
    return request.param


def pairs() -> list[tuple[io.BytesIO, int]]:
    return [(io.BytesIO(image), target) for image, target in zip(IMAGES, TARGETS, strict=True)]


def read_positions() -> list[tuple[io.BytesIO, int]]:
    """Streams that have been read to some place, and lists in place of tuples."""
    streams = pairs()
    streams[0][0].read(4)
    return streams


LAYOUTS = {
    "samples": lambda: {
        "classes": CLASSES,
        "class_to_idx": {name: number for number, name in enumerate(CLASSES)},
        "samples": read_positions(),
        "extensions": (".png",),
    },
    "imgs of lists": lambda: {"classes": CLASSES, "imgs": [list(pair) for pair in pairs()]},
    "targets beside": lambda: {
        "classes": CLASSES,
        "samples": [io.BytesIO(image) for image in IMAGES],
        "targets": TARGETS,
    },
    "class_to_idx alone": lambda: {"class_to_idx": {"owl": 2, "cat": 0, "dog": 1}, "imgs": pairs()},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_in_every_kind_of_file(
    tmp_path: Path, save: Save, layout: Callable[[], Any]
) -> None:
    path = tmp_path / "train_imgs.pt"
    save(layout(), path)
    pack = open_packed(path)
    assert pack.classes == CLASSES
    assert pack.targets.tolist() == TARGETS
    assert [pack.read(i).tobytes() for i in range(len(pack))] == IMAGES
    assert pack.name(3) == f"image 3 of {path}"
    again = pickle.loads(pickle.dumps(pack))
    assert [again.read(i).tobytes() for i in range(len(again))] == IMAGES


def test_a_list_alone_has_numbers_for_names(tmp_path: Path, save: Save) -> None:
    path = tmp_path / "train_imgs.pt"
    save(pairs(), path)
    old = read_old_pack(path)
    assert (old.classes, old.images, old.targets) == (["0", "1", "2"], IMAGES, TARGETS)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 5)), min_size=1))
def test_any_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, samples: Any) -> None:
    path = tmp_path_factory.mktemp("old") / "train_imgs.pt"
    torch.save([(io.BytesIO(data), max(target, 0)) for data, target in samples], path)
    if max(target for _, target in samples) >= len(samples):
        with pytest.raises(UserError, match="no list of class names"):
            read_old_pack(path)
        return
    old = read_old_pack(path)
    assert list(zip(old.images, old.targets, strict=True)) == samples


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def hostile(marker: Path) -> dict[str, Any]:
    touch = f"touch {marker}"
    return {
        "system": Calls(os.system, touch),
        "eval": Calls(eval, f"__import__('os').system({touch!r})"),
        "exec": Calls(exec, f"import os; os.system({touch!r})"),
        "run": Calls(subprocess.run, ["touch", str(marker)]),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, io.BytesIO, "read"),
        "torch": Calls(torch.load, str(marker)),
        "tensor": torch.zeros(3),
        "path": marker,
        "class": io.StringIO,
    }


@pytest.mark.parametrize("kind", hostile(Path()).keys())
@pytest.mark.parametrize("place", ["alone", "among images", "for a stream"])
def test_a_hostile_pickle_is_refused_and_not_executed(
    tmp_path: Path, save: Save, kind: str, place: str
) -> None:
    path, marker = tmp_path / "train_imgs.pt", tmp_path / "executed"
    evil = hostile(marker)[kind]
    content = {
        "alone": evil,
        "among images": {"classes": ["a"], "samples": [(io.BytesIO(b"x"), 0), (evil, 0)]},
        "for a stream": {"classes": ["a"], "samples": [(Calls(io.BytesIO, evil), 0)]},
    }[place]
    save(content, path)
    with pytest.raises(UserError) as caught:
        open_packed(path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch executed'\ntR.",
        b"(S'touch executed'\nios\nsystem\n.",
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"c_codecs\nencode\n}Vdefaults\nVx\nsb.",
        b"c_io\nBytesIO\n(I5\ntR.",
        b"c_io\nBytesIO\n)\x81(I5\ntb.",
        b"c_io\nBytesIO\n(tb.",
        b"c__builtin__\nbytes\n(I99999999999\ntR.",
        b"\x80\x02cio\nBytesIO.read\n.",
        b"\x80\x04\x8c\x02io\x8c\x0cBytesIO.read\x93.",
        b"P12\n.",
        b"I5\nQ.",
        b"\x82\x01.",
        b".",
        b"",
        b"\x80\xff.",
        b"not a pickle at all",
    ],
)
def test_pickles_written_by_hand_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("train_imgs.pt")
    path.write_bytes(code)
    with pytest.raises(UserError):
        read_old_pack(path)
    assert list(Path().iterdir()) == [path]


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x05B" + struct.pack("<I", 2**31 - 1),  # a length of 2 GiB
        b"\x80\x05\x8e" + struct.pack("<Q", 2**40),
        b"\x80\x05\x96" + struct.pack("<Q", 2**30),  # a byte array
        b"\x80\x04\x95" + struct.pack("<Q", 2**40),  # a frame
        b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b".",  # a memo of 4 billion entries
        b"\x80\x02X" + struct.pack("<I", 2**31 - 1),
        # One text of 100 kB encoded 10,000 times: 1 GB out of a file of 170 kB.
        b"\x80\x02](c_codecs\nencode\nq\0X"
        + struct.pack("<I", 100_000)
        + b"a" * 100_000
        + b"q\1X\6\0\0\0latin1q\2"
        + b"h\0h\1h\2\x86R" * 10_000
        + b"e.",
    ],
)
def test_absurd_sizes_are_refused_without_the_memory(tmp_path: Path, code: bytes) -> None:
    path = tmp_path / "train_imgs.pt"
    path.write_bytes(code)
    check = f"""
import resource
from pathlib import Path
from sanctl.data.legacy import read_old_pack
from sanctl.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_old_pack(Path({str(path)!r}))
except UserError as error:
    print(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 50, f"{{grown}} MiB"
"""
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_imgs.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(pairs(), 2))
    with pytest.raises(UserError, match="compressed"):
        read_old_pack(path)


def test_another_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_imgs.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/picture.png", b"x")
    with pytest.raises(UserError, match="zip archive, but not one of torch's"):
        read_old_pack(path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_a_cut_file_is_refused(tmp_path: Path, save: Save, keep: float) -> None:
    path = tmp_path / "train_imgs.pt"
    save(LAYOUTS["samples"](), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError):
        open_packed(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "other things than images"),
        ({}, "no list of images"),
        (5, "no list of images"),
        ({"classes": ["a"], "samples": [("x.png", 0)]}, "other things than images"),
        ({"classes": ["a"], "samples": [io.BytesIO(b"x")]}, "one class index for every image"),
        (
            {"classes": ["a"], "samples": [io.BytesIO(b"x")], "targets": [0, 0]},
            "one class index for every image",
        ),
        ({"classes": ["a"], "samples": [(io.BytesIO(b"x"), "0")]}, "not a number from 0"),
        ({"classes": ["a"], "samples": [(io.BytesIO(b"x"), -1)]}, "not a number from 0"),
        ({"classes": ["a"], "samples": [(io.BytesIO(b"x"), 1)]}, "class index 1 is beyond its 1"),
        ({"classes": [1], "samples": [(io.BytesIO(b"x"), 0)]}, "no list of class names"),
        ({"class_to_idx": {"a": "0"}, "samples": [(io.BytesIO(b"x"), 0)]}, "than numbers"),
        ([(io.BytesIO(b"x"), 10**9)], "no list of class names"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "train_imgs.pt"
    save_pickle(2)(content, path)
    with pytest.raises(UserError, match=message):
        read_old_pack(path)
