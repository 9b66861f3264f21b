"""`sanctl dataset index | split | pack | sample`, as a user types them."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from process_session import python

from sanctl.cli.main import main
from sanctl.data.index import index_folder, load_index, save_index
from sanctl.data.packed import open_packed

PNG = cv2.imencode(".png", np.full((2, 2), 200, np.uint8))[1].tobytes()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Done(NamedTuple):
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


Run = Callable[[str], Done]
Sanctl = Callable[[str], list[str]]
Refused = Callable[[str], str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line through the entry point, in this process, without a terminal."""

    def run_line(line: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["sanctl", "dataset", *line.split()])
        with pytest.raises(SystemExit) as caught:
            main()
        return Done(int(caught.value.code or 0), *capfd.readouterr())

    return run_line


@pytest.fixture
def sanctl(run: Run) -> Callable[[str], list[str]]:
    """Run a command that must succeed; returns the lines that it prints."""

    def succeed(line: str) -> list[str]:
        done = run(line)
        assert done.status == 0, done.err
        assert all(char.isprintable() or char == "\n" for char in done.out + done.err)
        return done.out.splitlines()

    return succeed


@pytest.fixture
def refused(run: Run) -> Callable[[str], str]:
    """Run a command that must fail; returns the one line that it says."""

    def fail(line: str) -> str:
        done = run(line)
        assert done.status == 2, done
        errors = [said for said in done.err.splitlines() if said.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in done.err
        assert done.err.endswith(f"{errors[0]}\n")
        return errors[0].removeprefix("error: ")

    return fail


def names(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def write(files: Iterable[str], data: bytes = PNG) -> None:
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)


def write_classes(folder: str, classes: Iterable[str], count: int) -> None:
    write(f"{folder}/{name}/{i:03d}.png" for name in classes for i in range(count))


def test_the_story_of_tu_berlin(sanctl: Sanctl, run: Run) -> None:
    root = "dataset/Sketch_EITZ"
    write_classes(f"{root}/png_w256", ("airplane", "zebra"), 10)
    write([f"{root}/png_w256/filelist.txt", f"{root}/png_w256/readme.txt"], b"text")
    done = run(f"index {root}/png_w256")
    assert done.out.splitlines() == [
        f"20 images of 2 classes, 10 per class; wrote {root}/data_init.pt",
        "next: sanctl dataset split --ratio 0.8",
    ]
    assert "warning: left out 2 files, no images by name or kind: " in done.err
    assert "filelist.txt" in done.err
    assert sanctl("split --ratio 0.8") == [
        f"16 images of 2 classes, 8 per class; wrote {root}/train_init.pt",
        f"4 images of 2 classes, 2 per class; wrote {root}/val_init.pt",
        "next: sanctl dataset pack",
    ]
    assert sanctl("pack") == [
        f"16 images, 0 of them shrunk, 0.0 MB; wrote {root}/train_imgs.pt",
        f"4 images, 0 of them shrunk, 0.0 MB; wrote {root}/val_imgs.pt",
        "next: sanctl config new sketch_eitz MODEL (sanctl config list names the models)",
    ]
    pack = open_packed(Path(root, "train_imgs.pt"))
    assert pack.classes == ["airplane", "zebra"]
    assert [pack.read(i).tobytes() for i in range(16)] == [PNG] * 16
    assert sorted(path.name for path in Path(root).iterdir()) == [
        "data_init.pt",
        "png_w256",
        "train_imgs.pt",
        "train_init.pt",
        "val_imgs.pt",
        "val_init.pt",
    ]


def test_an_index_made_for_one_part_is_to_be_packed(sanctl: Sanctl) -> None:
    write_classes("dataset/x/training", "ab", 2)
    assert sanctl("index dataset/x/training --out dataset/x/train_init.pt")[1] == (
        "next: sanctl dataset pack"
    )


def test_class_folders_two_levels_deep(sanctl: Sanctl) -> None:
    write_classes("dataset/omniglot/Greek", ("c1", "c2"), 3)
    write_classes("dataset/omniglot/Latin", ("c1",), 4)
    assert sanctl("index dataset/omniglot --depth 2")[0] == (
        "10 images of 3 classes, 3 to 4 per class; wrote dataset/omniglot/data_init.pt"
    )
    index = load_index(Path("dataset/omniglot/data_init.pt"))
    assert index.classes == ["Greek/c1", "Greek/c2", "Latin/c1"]
    assert index.path(0).is_file()


def test_a_dataset_in_parts_gets_an_index_for_each(sanctl: Sanctl, refused: Refused) -> None:
    for part in ("train", "val", "test"):
        write_classes(f"pictures/{part}", "ab", 2)
    said = sanctl("index pictures")
    assert said[-1] == "next: sanctl dataset pack pictures"
    indexes = [load_index(Path(f"pictures/{part}_init.pt")) for part in ("train", "val", "test")]
    assert [index.samples[0][0] for index in indexes] == [
        f"{part}/a/000.png" for part in ("train", "val", "test")
    ]
    assert not Path("pictures/data_init.pt").exists()
    assert "name a folder" in refused("index pictures --out x.pt")
    sanctl("index pictures --out elsewhere")
    assert load_index(Path("elsewhere/val_init.pt")).path(3).read_bytes() == PNG


def test_parts_with_different_classes_write_nothing(refused: Refused) -> None:
    write_classes("pictures/train", "ab", 2)
    write_classes("pictures/val", "a", 2)
    assert refused("index pictures").startswith("pictures/val: no folder for b, which train has")
    assert names("pictures") == ["train", "val"]


def test_parts_without_val_say_how_to_get_one(sanctl: Sanctl) -> None:
    for part in ("train", "test"):
        write_classes(f"dataset/cifar/{part}", "ab", 10)
    commands = [line.split(": sanctl dataset ")[1] for line in sanctl("index dataset/cifar")[-2:]]
    for command in commands:
        sanctl(command)
    sizes = {
        part: len(load_index(Path(f"dataset/cifar/{part}_init.pt")))
        for part in ("train", "val", "test")
    }
    assert sizes == {"train": 18, "val": 2, "test": 20}


def test_files_that_are_no_images_are_warned_of_and_stay_indexed(
    sanctl: Sanctl, refused: Refused, run: Run
) -> None:
    write_classes("png", "a", 3)
    write(["png/a/zero.png"], b"")
    write(["png/a/text.png"], b"I am no image, dear reader")
    done = run("index png")
    assert done.status == 0
    assert "warning: indexed 2 files whose content is no image: png/a/text.png, png/a/zero.png" in (
        done.err
    )
    assert len(load_index(Path("data_init.pt"))) == 5
    sanctl("split --ratio 0.5")
    assert refused("pack").startswith("png/a/")
    assert not Path("train_imgs.pt").exists() or not Path("val_imgs.pt").exists()


def test_a_name_of_broken_bytes_is_printed_as_escapes(run: Run) -> None:
    name = os.fsdecode(b"png/a/caf\xe9\n.txt")
    write_classes("png", "a", 2)
    write([name], b"x")
    done = run("index png")
    assert done.status == 0
    assert r"caf\udce9\n.txt" in done.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("index none", "none does not exist"),
        ("index file.zip", "file.zip is a file, not a folder"),
        ("index empty", "empty holds no folders"),
        ("index flat", "flat holds images but no folders"),
        ("index hollow", "hollow: class folder without images: b;"),
        ("index png --depth 0", "Invalid value for '--depth'"),
        ("split", "how to split? --ratio 0.8"),
        ("split one.pt --ratio 1.5", "ratio 1.5: each must lie between 0 and 1"),
        ("split --ratio 0.8 none", "none: there is no such folder"),
        ("split --ratio 0.8 none.pt", "none.pt: there is no such file"),
        ("split --ratio 0.8 one.pt", "class a has 1 image, too few"),
        ("split --ratio 0.8 junk.pt", "junk.pt: refused: damaged"),
        ("split --ratio 0.5 train_init.pt", "train_init.pt: the split would overwrite it"),
        ("pack none", "none: there is no such folder"),
        ("pack one.pt", "one.pt: the name of an index to pack ends in _init.pt"),
        ("pack empty", "empty: holds no train_init.pt, val_init.pt or test_init.pt; `sanctl"),
        ("pack --short-side 0", "Invalid value for '--short-side'"),
        ("sample --n 1", "where to? name a file"),
        ("sample --out x.pt", "what to keep?"),
        ("sample one.pt --n 2 --out x.pt", "class a has 1 images"),
        ("sample one.pt --exclude none.pt --out x.pt", "none.pt: there is no such file"),
        ("sample one.pt --exclude one.pt --out x.pt", "no image is left"),
    ],
)
def test_mistakes_are_one_line(line: str, message: str, refused: Refused) -> None:
    write_classes("png", "a", 2)
    write(["flat/1.png", "hollow/a/1.png", "hollow/b/x.txt"])
    write(["file.zip", "junk.pt"], b"junk")
    Path("empty").mkdir()
    torch.save({"classes": ["a"], "samples": [("png/a/000.png", 0)]}, "one.pt")
    torch.save({"classes": ["a"], "samples": [("png/a/000.png", 0)]}, "train_init.pt")
    before = names()
    assert message in refused(line)
    assert names() == before


def test_without_a_dataset_and_with_several(sanctl: Sanctl, refused: Refused) -> None:
    assert "no data_init.pt in this folder" in refused("split --ratio 0.8")
    for name in "ab":
        write_classes(f"dataset/{name}", "xy", 4)
        sanctl(f"index dataset/{name}")
    assert "several datasets: dataset/a, dataset/b" in refused("split --ratio 0.8")
    assert sanctl("split --ratio 0.5 b")[-1] == "next: sanctl dataset pack dataset/b"
    os.chdir("dataset/a")
    assert sanctl("split --ratio 0.5")[-1] == "next: sanctl dataset pack"
    assert Path("train_init.pt").is_file()


def test_an_earlier_test_part_that_shares_images_is_warned_of(sanctl: Sanctl, run: Run) -> None:
    write_classes("png", "a", 20)
    sanctl("index png")
    sanctl("split --ratio 0.6 --ratio 0.2")
    done = run("split --ratio 0.8 --seed 1")
    assert done.status == 0
    assert "warning: test_init.pt is of an earlier split and shares 4 images" in done.err
    assert load_index(Path("test_init.pt")).classes == ["a"]


def test_sample_and_what_it_leaves(sanctl: Sanctl, refused: Refused) -> None:
    write_classes("dataset/big", "abcdef", 10)
    sanctl("index dataset/big")
    said = sanctl("sample big --classes 3 --n 4 --out dataset/mini")
    assert said[0] == "12 images of 3 classes, 4 per class; wrote dataset/mini/data_init.pt"
    mini = load_index(Path("dataset/mini/data_init.pt"))
    assert {target for _, target in mini.samples} == {0, 1, 2}
    assert all(mini.path(i).is_file() for i in range(12))
    said = sanctl("sample big --exclude dataset/mini/data_init.pt --out dataset/rest/data_init.pt")
    assert said[0] == "left out 12 images that dataset/mini/data_init.pt lists"
    assert len(load_index(Path("dataset/rest/data_init.pt"))) == 48
    assert (
        sanctl("split mini --ratio 0.5")[-1]
        == "next: sanctl dataset pack dataset/mini --allow-outside"
    )
    refusal = refused("pack mini")
    assert "dataset/mini/train_init.pt: lists an image outside its folder: '../big/" in refusal
    assert "--allow-outside" in refusal
    sanctl("pack mini --allow-outside")
    assert len(open_packed(Path("dataset/mini/val_imgs.pt"))) == 6


def test_pack_shrinks_to_the_short_side(sanctl: Sanctl) -> None:
    image = cv2.imencode(".jpg", np.full((300, 400, 3), 90, np.uint8))[1].tobytes()
    write([f"png/a/{i}.jpg" for i in range(4)], image)
    sanctl("index png --out photos_init.pt")
    assert sanctl("pack photos_init.pt --short-side 300")[0].startswith(
        "4 images, 0 of them shrunk"
    )
    assert sanctl("pack photos_init.pt")[0].startswith("4 images, 4 of them shrunk")
    packed = open_packed(Path("photos_imgs.pt")).read(0)
    decoded = cv2.imdecode(packed, cv2.IMREAD_COLOR)
    assert decoded is not None
    assert decoded.shape == (256, 341, 3)


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def test_ctrl_c_while_packing() -> None:
    write_classes("png", "ab", 10)
    save_index(index_folder(Path("png"))[0], Path("train_init.pt"))
    Path("train_imgs.pt").write_bytes(b"the previous one")
    image = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), np.uint8)
    write(["png/a/000.png"], cv2.imencode(".png", image)[1].tobytes())
    for path in [*Path("png/a").iterdir(), *Path("png/b").iterdir()]:
        if path.name != "000.png":
            path.unlink()
            path.hardlink_to("png/a/000.png")
    before = names()
    with python("-m", "sanctl", "dataset", "pack", "--workers", "2") as process:
        while len(children(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.3)
        workers = children(process.pid)
        assert len(workers) >= 2
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    said = [line for line in err.splitlines() if not line.startswith("pack train_init.pt")]
    assert len(said) == 1
    assert "interrupted" in said[0]
    assert Path("train_imgs.pt").read_bytes() == b"the previous one"
    assert names() == before
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
