import math
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from file_trees import write_classes
from hypothesis import given
from hypothesis import strategies as st

from sanctl.data.index import ImageIndex, index_folder, load_index, save_index
from sanctl.data.split import save_split, split_index
from sanctl.errors import SanctlError, UserError

RATIOS = st.one_of(
    st.floats(0.02, 0.98).map(lambda ratio: [ratio]),
    st.tuples(st.floats(0.05, 0.6), st.floats(0.05, 0.35)).map(list),
    st.sampled_from([[0.8], [0.8, 0.2], [0.8, 0.1], [0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.29]]),
)
COUNTS = st.dictionaries(
    st.text(string.ascii_lowercase + "é ", min_size=1, max_size=3), st.integers(1, 60), min_size=1
)


def make_index(counts: dict[str, int]) -> ImageIndex:
    samples = [
        (f"no-such-folder/{name}/{i}.png", target)
        for target, (name, count) in enumerate(counts.items())
        for i in range(count)
    ]
    return ImageIndex(list(counts), samples)


def shares(ratios: list[float]) -> list[float]:
    """The share of every part, by the rule as users know it."""
    rest = 1 - sum(ratios)
    return ratios if abs(rest) < 1e-9 else [*ratios, rest]


def class_sizes(part: ImageIndex) -> list[int]:
    return [
        sum(1 for _, target in part.samples if target == number)
        for number in range(len(part.classes))
    ]


def possible(count: int, wanted: list[float]) -> bool:
    """Whether whole sizes exist that are at least 1 and within one image of their share."""
    low = [max(1, math.ceil(count * share - 1 - 1e-9)) for share in wanted]
    high = [math.floor(count * share + 1 + 1e-9) for share in wanted]
    return sum(low) <= count <= sum(high)


@given(COUNTS, RATIOS, st.integers(0, 2**40))
def test_parts_hold_every_image_once_and_keep_the_ratio_in_every_class(
    counts: dict[str, int], ratios: list[float], seed: int
) -> None:
    index, wanted = make_index(counts), shares(ratios)
    if not all(possible(count, wanted) for count in counts.values()):
        with pytest.raises(UserError, match=r"class .* has \d+ images?, too few for"):
            split_index(index, ratios, seed)
        return
    parts = split_index(index, ratios, seed)
    assert len(parts) == len(wanted)
    together = [sample for part in parts for sample in part.samples]
    assert sorted(together) == sorted(index.samples)
    for part, share in zip(parts, wanted, strict=True):
        assert part.classes == index.classes
        for size, count in zip(class_sizes(part), counts.values(), strict=True):
            assert size >= 1
            assert abs(size - count * share) <= 1 + 1e-9


@given(
    st.dictionaries(st.text("abc", min_size=1), st.integers(3, 20), min_size=1),
    st.integers(0, 9),
    st.randoms(),
)
def test_the_order_of_the_index_does_not_matter(
    counts: dict[str, int], seed: int, random: "object"
) -> None:
    index = make_index(counts)
    shuffled = list(index.samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    expected = split_index(index, [0.6], seed)
    got = split_index(replace(index, samples=shuffled), [0.6], seed)
    assert [set(part.samples) for part in got] == [set(part.samples) for part in expected]


def test_the_seed_matters() -> None:
    index = make_index({"a": 50, "b": 50})
    first, again, other = (split_index(index, [0.5], seed)[0].samples for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_classes_are_drawn_independently() -> None:
    both = split_index(make_index({"a": 40, "b": 40}), [0.5], 0)[0]
    alone = split_index(make_index({"b": 40}), [0.5], 0)[0]
    assert [path for path, target in both.samples if target == 1] == [p for p, _ in alone.samples]
    # Equal draws for all classes would put equal numbers into training.
    numbers = [
        {Path(path).stem for path, target in both.samples if target == number} for number in (0, 1)
    ]
    assert numbers[0] != numbers[1]


def test_the_split_of_today_stays_that_of_tomorrow() -> None:
    part = split_index(make_index({"cat": 10}), [0.5], 0)[0]
    assert [Path(path).stem for path, _ in part.samples] == ["1", "2", "6", "7", "9"]


def test_exact_ratios_give_exact_sizes() -> None:
    index = make_index({"a": 20, "b": 100})
    assert [class_sizes(part) for part in split_index(index, [0.8], 0)] == [[16, 80], [4, 20]]
    assert [class_sizes(part) for part in split_index(index, [0.8, 0.1], 0)] == [
        [16, 80],
        [2, 10],
        [2, 10],
    ]
    assert len(split_index(index, [0.7, 0.3], 0)) == 2
    assert len(split_index(index, [0.7, 0.2, 0.1], 0)) == 3


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ([], r"ratio \(none\)"),
        ([0.0], "ratio 0: each must lie between 0 and 1"),
        ([1.0], "ratio 1: each must"),
        ([80], "ratio 80: each must"),
        ([-0.2], "between 0 and 1"),
        ([float("nan")], "between 0 and 1"),
        ([0.8, 0.3], "add up to more than 1"),
        ([0.5, 0.2, 0.1], "make 4 parts"),
        ([0.25, 0.25, 0.25, 0.25], "make 4 parts"),
    ],
)
def test_ratios_that_are_none(ratios: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_index(make_index({"a": 10}), ratios, 0)


@pytest.mark.parametrize(("count", "ratios"), [(1, [0.8]), (2, [0.8, 0.1]), (3, [0.8, 0.1])])
def test_a_class_that_is_too_small_is_named_with_its_count(count: int, ratios: list[float]) -> None:
    with pytest.raises(UserError, match=f"class tiny has {count} image"):
        split_index(make_index({"big": 50, "tiny": count}), ratios, 0)


def test_a_class_without_images_is_named() -> None:
    index = ImageIndex(["a", "b"], [(f"{i}.png", 0) for i in range(9)])
    with pytest.raises(UserError, match="class b has 0 images"):
        split_index(index, [0.5], 0)


def test_an_empty_index() -> None:
    with pytest.raises(UserError, match="nothing to split"):
        split_index(ImageIndex(["a"], []), [0.5], 0)


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (("png/a/0001.png", 0), "0001.png is listed twice in class a"),
        (("./png//a/0001.png", 0), r"listed twice in class a \(also as png/a/0001.png\)"),
        (("png/link/0001.png", 0), "listed twice in class a"),
        (("png/a/0001.png", 1), "listed twice in classes a and b"),
    ],
)
def test_a_file_listed_twice_is_refused(
    tmp_path: Path, again: tuple[str, int], message: str
) -> None:
    write_classes(tmp_path / "png", {"a": 4, "b": 4})
    (tmp_path / "png/link").symlink_to("a")
    samples = [(f"png/{name}/{i:04d}.png", t) for t, name in enumerate("ab") for i in range(4)]
    index = ImageIndex(["a", "b"], [*samples, again], root=tmp_path)
    with pytest.raises(UserError, match=message):
        split_index(index, [0.5], 0)


def test_the_same_folder_indexed_elsewhere_splits_alike(tmp_path: Path) -> None:
    write_classes(tmp_path / "set/png", {"a": 12, "b": 12})
    index, _ = index_folder(tmp_path / "set/png")
    chosen = []
    for place in ("set/data_init.pt", "set/png/data_init.pt", "far/off/data_init.pt"):
        save_index(index, tmp_path / place)
        part = split_index(load_index(tmp_path / place), [0.5], 0)[0]
        chosen.append([part.path(i).resolve() for i in range(len(part))])
    assert chosen[0] == chosen[1] == chosen[2]


def test_saved_parts_have_their_final_names(tmp_path: Path) -> None:
    write_classes(tmp_path / "png", {"a": 10, "b": 10})
    index, _ = index_folder(tmp_path / "png")
    paths = save_split(split_index(index, [0.8, 0.1], 0), tmp_path)
    assert [path.name for path in paths] == ["train_init.pt", "val_init.pt", "test_init.pt"]
    assert sum(len(load_index(path)) for path in paths) == 20
    assert all(load_index(path).path(0).is_file() for path in paths)
    assert torch.load(paths[1], weights_only=True)["class_to_idx"] == {"a": 0, "b": 1}


def test_a_split_that_fails_half_way_changes_no_part(tmp_path: Path) -> None:
    index = make_index({"a": 20_000})
    save_split(split_index(make_index({"a": 4}), [0.5], 0), tmp_path)
    save_index(index, tmp_path / "data_init.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # The train part fits below the limit on file sizes, the larger val part does not.
    code = f"""
import resource
from pathlib import Path
from sanctl.data.index import load_index
from sanctl.data.split import save_split, split_index
from sanctl.errors import SanctlError
folder = Path({str(tmp_path)!r})
parts = split_index(load_index(folder / "data_init.pt"), [0.1], 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_split(parts, folder)
except SanctlError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "val_init.pt: File too large; the previous file is intact" in done.stdout
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    parts = split_index(make_index({"a": 4}), [0.5], 0)
    with pytest.raises(SanctlError, match="cannot write"):
        save_split(parts, tmp_path / "file")
