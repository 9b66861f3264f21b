"""What a checkpoint's checksum notices, and what it leaves as it was."""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sanctl.engine.checkpoint import FORMAT, Checkpoint, load_checkpoint
from sanctl.errors import UserError

WEIGHTS = {"a": torch.arange(100.0), "b": torch.ones(2, 3)}


def written() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        Checkpoint(WEIGHTS, epoch=3, classes=["ant", "bee"]).save(path)
        return path.read_bytes()


WHOLE = written()


def refusal(content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value)


def flipped(bits: set[int]) -> bytes:
    content = bytearray(WHOLE)
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


@given(st.sets(st.integers(0, len(WHOLE) * 8 - 1), min_size=1, max_size=4))
def test_flipped_bits_are_noticed_wherever_they_are(bits: set[int]) -> None:
    assert "damaged" in refusal(flipped(bits))


@pytest.mark.parametrize("from_end", range(1, 103))
def test_a_flipped_bit_of_the_checksum_and_of_what_it_stands_in_is_noticed(from_end: int) -> None:
    for bit in range(8):
        assert "damaged" in refusal(flipped({(len(WHOLE) - from_end) * 8 + bit}))


@given(st.integers(0, len(WHOLE) - 1))
def test_a_part_is_refused(length: int) -> None:
    refusal(WHOLE[:length])


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 5000))
def test_a_stretch_of_zeros_is_noticed(start: int, length: int) -> None:
    content = WHOLE[:start] + bytes(len(WHOLE[start : start + length])) + WHOLE[start + length :]
    if content != WHOLE:
        refusal(content)


def test_the_message_says_what_is_wrong() -> None:
    assert "its checksum does not match" in refusal(flipped({8000}))


def test_it_is_the_sha256_of_the_file_as_torch_writes_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as archive:
        comment = archive.comment
    mark, algorithm, digest = comment.decode().split()
    assert (mark, algorithm) == ("sanctl", "sha256")
    plain = WHOLE[: -len(comment) - 2] + b"\0\0"  # the length of the comment stands before it
    assert hashlib.sha256(plain).hexdigest() == digest
    (tmp_path / "plain.pth").write_bytes(plain)
    assert load_checkpoint(tmp_path / "plain.pth").epoch == 3


@pytest.mark.parametrize("mmap", [False, True])
def test_another_program_reads_the_file_with_torch_alone(tmp_path: Path, mmap: bool) -> None:
    (tmp_path / "x.pth").write_bytes(WHOLE)
    program = (
        f"import torch; c = torch.load('x.pth', mmap={mmap}, weights_only=True); "
        "print(c['epoch'], c['classes'], c['state_dict']['a'].sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "3 ['ant', 'bee'] 4950.0\n"
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        assert archive.testzip() is None


def test_what_another_program_writes_again_has_no_checksum_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    content = torch.load(io.BytesIO(WHOLE), weights_only=True)
    content["state_dict"]["a"] += 1
    torch.save(content, path)
    assert content["format"] == FORMAT
    assert torch.equal(load_checkpoint(path).state_dict["a"], WEIGHTS["a"] + 1)


def test_a_file_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    Checkpoint({"a": torch.arange(700_000)}, epoch=1).save(path)
    assert load_checkpoint(path).state_dict["a"][-1] == 699_999
    content = bytearray(path.read_bytes())
    content[4_000_000] ^= 4
    assert "checksum" in refusal(bytes(content))
