"""Damaged files of every kind are read or refused; nothing else ever happens."""

from pathlib import Path

import pytest
from fuzz_inputs import READERS, Reader, Splice, damaged, damaged_inside, kept, outcome, splices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module", params=READERS, ids=lambda reader: reader.name)
def reader(request: pytest.FixtureRequest) -> Reader:
    assert isinstance(request.param, Reader)
    return request.param


@pytest.fixture(scope="module")
def whole(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return reader.whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def test_whole_files_are_read(reader: Reader, whole: list[bytes], folder: Path) -> None:
    assert {outcome(reader, data, folder) for data in whole} == {"read"}


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 99), splices, kept)
def test_damaged_files_are_read_or_refused(
    reader: Reader, whole: list[bytes], folder: Path, which: int, cuts: list[Splice], share: float
) -> None:
    data = whole[which % len(whole)]
    outcome(reader, damaged(data, cuts, share), folder)
    outcome(reader, damaged_inside(data, which, cuts, share), folder)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_noise_is_read_or_refused(reader: Reader, folder: Path, data: bytes) -> None:
    outcome(reader, data, folder)
