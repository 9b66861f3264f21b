import os
from pathlib import Path

import pytest

from sanctl.data.decode import ImageError
from sanctl.data.read import read_image


def reason(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert "\n" not in caught.value.reason
    return caught.value.reason


def test_the_bytes_of_a_file_and_of_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"bytes")
    (tmp_path / "b.png").symlink_to("a.png")
    assert read_image(tmp_path / "a.png") == read_image(tmp_path / "b.png") == b"bytes"


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "self.png").symlink_to("self.png")
    assert reason(tmp_path / "pipe.png") == "it is not a regular file"
    assert reason(Path("/dev/zero")) == "it is not a regular file"
    assert reason(tmp_path) != ""
    assert "symbolic links" in reason(tmp_path / "self.png")
    assert "No such file" in reason(tmp_path / "none.png")


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    assert reason(tmp_path / name) == "no file can have this name"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert "too long" in reason(tmp_path / ("x" * 5000))


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    assert reason(tmp_path / "huge.png") == "it is larger than any image"
