import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_trees import PNG, encode, photo, write_classes, write_tree
from process_session import python

from sanctl.data.decode import ImageError
from sanctl.data.index import ImageIndex, index_folder
from sanctl.data.pack import pack_index
from sanctl.data.packed import open_packed
from sanctl.errors import SanctlError, UserError

# Peak of the memory that is the process's own; mapped files, which the system takes back when it
# needs room, do not count.
OWN_MEMORY = """
import threading, time
def own_mib():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.start_mib = self.peak_mib = own_mib()
        self.start()
    def run(self):
        while True:
            self.peak_mib = max(self.peak_mib, own_mib())
            time.sleep(0.002)
    def grown(self):
        time.sleep(0.02)
        return self.peak_mib - self.start_mib
"""


def run_code(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_small_images_keep_their_bytes_in_the_order_of_the_index(
    tmp_path: Path, workers: int
) -> None:
    expected = {}
    for number in range(150):
        image = photo(8, 8 + number % 5, seed=number)
        data = encode(image, (".png", ".jpg", ".bmp", ".tif", ".webp", ".ppm")[number % 6])
        name = f"c{number % 4}/{number}.png"
        expected[name] = data
        write_tree(tmp_path / "png", [name], data)
    index, _ = index_folder(tmp_path / "png")
    seen: list[int] = []
    out = tmp_path / "train_imgs.pt"
    result = pack_index(index, index.root, out, workers=workers, progress=seen.append)
    assert (result.images, result.shrunk) == (150, 0)
    assert result.bytes == sum(map(len, expected.values()))
    assert sum(seen) == 150
    pack = open_packed(out)
    assert pack.classes == index.classes
    assert pack.targets.tolist() == index.targets.tolist()
    assert [pack.name(i) for i in range(150)] == [path for path, _ in index.samples]
    assert {pack.name(i): pack.read(i).tobytes() for i in range(150)} == expected
    assert names_in(tmp_path) == ["png", "train_imgs.pt"]


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    write_classes(tmp_path / "png", {"a": 2, "b": 1})
    index, _ = index_folder(tmp_path / "png")
    pack_index(index, index.root, tmp_path / "x_imgs.pt")
    content = torch.load(tmp_path / "x_imgs.pt", weights_only=True)
    assert content["classes"] == ["a", "b"]
    assert content["class_to_idx"] == {"a": 0, "b": 1}
    assert content["data"].dtype == torch.uint8
    assert bytes(content["data"].numpy()) == PNG * 3
    assert content["offsets"].tolist() == [0, len(PNG), 2 * len(PNG), 3 * len(PNG)]
    assert content["offsets"].dtype == content["targets"].dtype == torch.int64
    assert content["targets"].tolist() == [0, 0, 1]
    assert content["version"] == 1
    assert ".png" in content["extensions"]


def test_read_gives_a_view_and_a_worker_maps_the_file_again(tmp_path: Path) -> None:
    write_classes(tmp_path / "png", {"a": 3})
    index, _ = index_folder(tmp_path / "png")
    pack_index(index, index.root, tmp_path / "x_imgs.pt")
    pack = open_packed(tmp_path / "x_imgs.pt")
    assert np.shares_memory(pack.read(1), pack.data)
    sent = pickle.dumps(pack)
    assert len(sent) < 500
    assert pickle.loads(sent).read(2).tobytes() == PNG


def broken_files() -> dict[str, bytes | None]:
    whole = encode(photo(64, 64))
    return {
        "empty": b"",
        "text": b"this is no image",
        "cut jpeg": whole[: len(whole) // 2],
        "cut png": encode(photo(64, 64), ".png")[:900],
        "missing": None,
    }


@pytest.mark.parametrize("kind", broken_files().keys())
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_and_nothing_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, workers: int
) -> None:
    folder = write_classes(tmp_path / "png", {"a": 40, "b": 40})
    index, _ = index_folder(folder)
    bad, data = folder / "b/0007.png", broken_files()[kind]
    bad.unlink()
    if data is not None:
        bad.write_bytes(data)
    out = tmp_path / "train_imgs.pt"
    out.write_bytes(b"the previous one")
    with pytest.raises(ImageError) as caught:
        pack_index(index, folder, out, workers=workers)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"the previous one"
    assert names_in(tmp_path) == ["png", "train_imgs.pt"]
    # What the image libraries have to say is in the error.
    assert capfd.readouterr() == ("", "")


def test_an_empty_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images to pack"):
        pack_index(ImageIndex(["a"], []), tmp_path, tmp_path / "x_imgs.pt")


def test_memory_stays_bounded_while_packing(tmp_path: Path) -> None:
    # 480 hard links to one image of 0.5 MB: 240 MB go through.
    noise = np.random.default_rng(0).integers(0, 256, (410, 410, 3), np.uint8)
    write_tree(tmp_path / "png", ["a/0.bmp"], encode(noise, ".bmp"))
    for number in range(1, 480):
        os.link(tmp_path / "png/a/0.bmp", tmp_path / f"png/a/{number}.bmp")
    code = f"""{OWN_MEMORY}
import sys
from pathlib import Path
from sanctl.data.index import index_folder
from sanctl.data.pack import pack_index
folder = Path(sys.argv[1])
index, _ = index_folder(folder / "png")
peak = Peak()
print(pack_index(index, index.root, folder / "x_imgs.pt", short_side=4096, workers=0).bytes)
print(peak.grown())
"""
    packed, grown = run_code(code, tmp_path).split()
    assert int(packed) > 235e6
    assert float(grown) < 80
    assert len(open_packed(tmp_path / "x_imgs.pt")) == 480


def test_opening_a_large_pack_takes_no_memory(tmp_path: Path) -> None:
    write_classes(tmp_path / "png", {"a": 1})
    index, _ = index_folder(tmp_path / "png")
    path = tmp_path / "x_imgs.pt"
    pack_index(index, index.root, path)
    content = torch.load(path, weights_only=True)
    content["data"] = torch.zeros(300_000_000, dtype=torch.uint8)
    content["offsets"] = torch.tensor([0, 300_000_000])
    torch.save(content, path)
    code = """
import resource, sys
from pathlib import Path
from sanctl.data.packed import open_packed
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack = open_packed(Path(sys.argv[1]))
first = pack.read(0)[150_000_000:150_000_100].sum()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(run_code(code, path)) < 30


def test_a_full_disk_leaves_the_previous_pack(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    write_tree(tmp_path / "png", [f"a/{i}.png" for i in range(9)], encode(noise, ".png"))
    out = tmp_path / "x_imgs.pt"
    out.write_bytes(b"the previous one")
    code = """
import resource, sys
from pathlib import Path
from sanctl.data.index import index_folder
from sanctl.data.pack import pack_index
from sanctl.errors import SanctlError
folder = Path(sys.argv[1])
index, _ = index_folder(folder / "png")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    pack_index(index, index.root, folder / "x_imgs.pt")
except SanctlError as error:
    print(error)
"""
    size = 9 * len(encode(noise, ".png"))
    for limit in (100_000, size + 100):  # while reading the images, and while writing the pack
        said = run_code(code, tmp_path, limit)
        assert said.startswith(f"cannot write {out}: File too large; the previous file is intact")
        assert out.read_bytes() == b"the previous one"
        assert names_in(tmp_path) == ["png", "x_imgs.pt"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_pack_that_is_stopped_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    write_classes(tmp_path / "png", {"a": 400})
    out = tmp_path / "x_imgs.pt"
    out.write_bytes(b"the previous one")
    code = """
import sys, time
from pathlib import Path
from sanctl.data.index import index_folder
from sanctl.data.pack import pack_index
folder = Path(sys.argv[1])
index, _ = index_folder(folder / "png")
def packed(images):
    print("some images are packed", flush=True)
    time.sleep(0.5)
try:
    pack_index(index, index.root, folder / "x_imgs.pt", workers=2, progress=packed)
except KeyboardInterrupt:
    sys.exit(130)
"""
    with python("-c", code, str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("some images")
        os.killpg(process.pid, how)  # as a terminal does: to all processes of the command
        _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert said == ""
    assert out.read_bytes() == b"the previous one"
    assert names_in(tmp_path) == ["png", "x_imgs.pt"]


def valid_content() -> dict[str, Any]:
    return {
        "format": "sanctl.packed_images",
        "version": 1,
        "classes": ["a", "b"],
        "class_to_idx": {"a": 0, "b": 1},
        "data": torch.arange(5, dtype=torch.uint8),
        "offsets": torch.tensor([0, 2, 5]),
        "targets": torch.tensor([1, 0]),
        "names": torch.tensor(list(b"xyz"), dtype=torch.uint8),
        "name_offsets": torch.tensor([0, 1, 3]),
        "extensions": (".png",),
    }


def test_the_valid_content_of_the_next_test_opens(tmp_path: Path) -> None:
    torch.save(valid_content(), tmp_path / "x_imgs.pt")
    pack = open_packed(tmp_path / "x_imgs.pt")
    assert (pack.read(1).tolist(), pack.name(1)) == ([2, 3, 4], "yz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a pack of images"),
        ({"version": 2}, "is a pack of version 2"),
        ({"classes": None}, "`classes` is not a list of names"),
        ({"data": torch.zeros(5)}, "`data` is not a row of uint8"),
        ({"data": None}, "`data` is not a row of uint8"),
        ({"targets": torch.tensor([[1, 0]])}, "`targets` is not a row of int64"),
        ({"targets": torch.tensor([1, 2])}, "class index lies outside 0 to 1"),
        ({"targets": torch.tensor([1, -1])}, "class index lies outside 0 to 1"),
        ({"targets": torch.tensor([1, 0, 0])}, "different lengths"),
        ({"offsets": torch.tensor([0, 2, 6])}, "different lengths"),
        ({"offsets": torch.tensor([1, 2, 5])}, "different lengths"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "different lengths"),
        ({"name_offsets": torch.tensor([0, 3])}, "different lengths"),
    ],
)
def test_a_pack_that_contradicts_itself_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "x_imgs.pt"
    torch.save({**valid_content(), **change}, path)
    with pytest.raises(UserError, match=message) as caught:
        open_packed(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_cut_pack_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "x_imgs.pt"
    torch.save(valid_content(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=r"x_imgs\.pt"):
        open_packed(path)


def test_a_missing_pack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        open_packed(tmp_path / "x_imgs.pt")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    write_classes(tmp_path / "png", {"a": 1})
    index, _ = index_folder(tmp_path / "png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SanctlError, match="cannot write"):
        pack_index(index, index.root, tmp_path / "file/x_imgs.pt")
