import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
from file_trees import write_classes
from hypothesis import given
from hypothesis import strategies as st

from sanctl.data.index import ImageIndex, index_folder, load_index, save_index
from sanctl.data.sample import sample_index, without
from sanctl.errors import UserError

COUNTS = st.dictionaries(
    st.text(string.ascii_lowercase, min_size=1, max_size=3), st.integers(1, 30), min_size=1
)


def make_index(counts: dict[str, int]) -> ImageIndex:
    samples = [
        (f"no-such-folder/{name}/{i}.png", target)
        for target, (name, count) in enumerate(counts.items())
        for i in range(count)
    ]
    return ImageIndex(list(counts), samples)


def by_class(index: ImageIndex) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set() for name in index.classes}
    for path, target in index.samples:
        found[index.classes[target]].add(path)
    return found


@given(COUNTS, st.data())
def test_a_number_of_each_class(counts: dict[str, int], data: st.DataObject) -> None:
    index = make_index(counts)
    n = data.draw(st.integers(1, min(counts.values())))
    part = sample_index(index, n=n, seed=data.draw(st.integers(0, 99)))
    assert part.classes == index.classes
    whole = by_class(index)
    for name, paths in by_class(part).items():
        assert len(paths) == n
        assert paths <= whole[name]
    assert [s for s in index.samples if s in set(part.samples)] == part.samples


@given(COUNTS, st.floats(0.01, 1))
def test_a_share_of_each_class(counts: dict[str, int], frac: float) -> None:
    part = sample_index(make_index(counts), frac=frac)
    for name, paths in by_class(part).items():
        assert len(paths) >= 1
        assert abs(len(paths) - counts[name] * frac) <= max(0.5, 1 - counts[name] * frac) + 1e-9


@given(COUNTS, st.data())
def test_random_classes_numbered_anew(counts: dict[str, int], data: st.DataObject) -> None:
    index = make_index(counts)
    wanted = data.draw(st.integers(1, len(counts)))
    part = sample_index(index, classes=wanted, seed=data.draw(st.integers(0, 99)))
    assert len(part.classes) == wanted
    assert part.classes == [name for name in index.classes if name in set(part.classes)]
    assert {target for _, target in part.samples} == set(range(wanted))
    whole = by_class(index)
    assert by_class(part) == {name: whole[name] for name in part.classes}


def test_options_combine() -> None:
    index = make_index(dict.fromkeys("abcdefgh", 20))
    part = sample_index(index, classes=3, n=4, seed=1)
    assert [len(paths) for paths in by_class(part).values()] == [4, 4, 4]


def test_the_seed_decides_and_the_order_does_not() -> None:
    index = make_index(dict.fromkeys("abcdefgh", 20))
    samples = list(index.samples)
    random.Random(0).shuffle(samples)
    shuffled = replace(index, samples=samples)
    first = sample_index(index, classes=4, n=5, seed=3)
    assert by_class(sample_index(shuffled, classes=4, n=5, seed=3)) == by_class(first)
    assert by_class(sample_index(index, classes=4, n=5, seed=4)) != by_class(first)


def test_all_classes_are_drawn_in_time() -> None:
    index = make_index(dict.fromkeys("abcde", 1))
    drawn = {sample_index(index, classes=1, seed=seed).classes[0] for seed in range(60)}
    assert drawn == set("abcde")


def test_exclude_knows_a_file_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "set/png", {"a": 6, "b": 6, "c": 2})
    index, _ = index_folder(tmp_path / "set/png")
    save_index(index, tmp_path / "set/data_init.pt")
    listed = ["a/0000.png", "a/0003.png", "b/0001.png", "c/0000.png", "c/0001.png"]
    other = replace(index, samples=[s for s in index.samples if s[0] in listed])
    save_index(other, tmp_path / "far/away/other.pt")
    monkeypatch.chdir(tmp_path)
    whole = load_index(Path("set/data_init.pt"))
    rest = sample_index(whole, exclude=load_index(Path("far/away/other.pt")))
    assert rest.classes == ["a", "b"]  # nothing of c is left
    kept = {f"{Path(path).parent.name}/{Path(path).name}" for path, _ in rest.samples}
    assert kept == {path for path, _ in index.samples} - set(listed)
    assert len(without(whole, whole)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 5}, "--n 5 images per class: class b has 4 images"),
        ({"n": 0}, "--n 0 images per class: at least 1"),
        ({"frac": 0.0}, "--frac 0: choose a share above 0"),
        ({"frac": 1.5}, "--frac 1.5"),
        ({"frac": float("nan")}, "--frac nan"),
        ({"classes": 3}, "--classes 3: choose 1 to 2"),
        ({"classes": 0}, "--classes 0: choose 1 to 2"),
        ({"n": 1, "frac": 0.5}, "--n and --frac exclude each other"),
    ],
)
def test_what_cannot_be_sampled(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_index(make_index({"a": 9, "b": 4}), **options)  # type: ignore[arg-type]


def test_when_nothing_is_left() -> None:
    index = make_index({"a": 2})
    with pytest.raises(UserError, match="no image is left"):
        sample_index(index, exclude=index)
