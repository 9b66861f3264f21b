"""A run folder that one process has, and others want."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from claims import contend
from tiny_run import Place, environment

from sanctl.engine.claim import claimed
from sanctl.errors import SanctlError, UserError

HOLD = """
import os, sys, time
from pathlib import Path
from sanctl.engine.claim import claimed

with claimed(Path(sys.argv[1])) as notes:
    worker = os.fork()  # as a data worker is, which outlives a process that is killed
    if worker:
        print(worker, *notes, flush=True)
    time.sleep(600)
"""


@contextmanager
def held(root: Path) -> Iterator[int]:
    """A process that has the folder, with a forked one; killed at the end at the latest."""
    command = [sys.executable, "-c", HOLD, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            yield process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            process.kill()


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught, claimed(root):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_second_is_told_who_has_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "exp" / "tiny"
    with held(root) as pid:
        message = refusal(root)
        assert refusal(root) == message
    assert message.startswith(f"{root}: a run is under way there already (process {pid} on ")
    assert f" on {socket.gethostname()} since " in message
    since = datetime.fromisoformat(message.split(" since ")[1].split(")")[0])
    assert timedelta(0) <= datetime.now().astimezone() - since < timedelta(minutes=5)


def test_a_killed_process_has_nothing_though_its_worker_lives(tmp_path: Path) -> None:
    with held(tmp_path) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / ".lock").exists()
        with claimed(tmp_path) as notes:
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
            assert notes == []


def test_nothing_stays_of_a_folder_that_nothing_came_into(tmp_path: Path) -> None:
    with claimed(tmp_path / "exp" / "tiny"):
        assert (tmp_path / "exp" / "tiny").is_dir()
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "exp" / "tiny"):
        (tmp_path / "exp" / "other").mkdir()
    assert list(tmp_path.rglob("*")) == [tmp_path / "exp", tmp_path / "exp" / "other"]


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with claimed(tmp_path):
        pass
    assert tmp_path.exists()
    assert list(tmp_path.iterdir()) == []


def test_never_are_two_inside(tmp_path: Path) -> None:
    root = tmp_path / "exp" / "tiny"
    held, refused, together = contend(root, processes=4, times=30)
    assert (held, together) == (120, 0)
    assert refused > 0
    assert list(tmp_path.rglob(".lock")) == []


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[]", b'{"pid": 3}', b"null", b"9" * 5000])
def test_a_holder_that_has_said_nothing_of_use(tmp_path: Path, content: bytes) -> None:
    with held(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        assert "already (another process)" in refusal(tmp_path)


def test_what_a_holder_says_cannot_fill_or_command_the_screen(tmp_path: Path) -> None:
    with held(tmp_path):
        said = {"pid": "\x1b[2J\n", "host": "x" * 700, "since": [["\x1b"]]}
        (tmp_path / ".lock").write_text(json.dumps(said))
        message = refusal(tmp_path)
    assert message.isprintable()
    assert len(message) < 500 + len(str(tmp_path))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(SanctlError, match=r"cannot write .*\.lock"), claimed(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "content"


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "exp").write_text("")
    with pytest.raises(SanctlError, match="cannot write"), claimed(tmp_path / "exp" / "tiny"):
        pass


def require_refusal(status: int, err: str, pid: int) -> None:
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith("error: exp/shapes/tiny: a run is under way there already (")
    assert f"process {pid} on" in line


def test_a_second_run_is_refused_and_writes_nothing(place: Place) -> None:
    with held(place.run) as pid:
        for extra in ((), ("--resume", "auto")):
            status, _, err = place.main("train", "shapes", "tiny", *extra)
            require_refusal(status, err, pid)
        done = place.sanctl("train", "shapes", "tiny", "--nproc", "2", "--device", "cpu")
        require_refusal(done.returncode, done.stderr, pid)
        assert [path.name for path in place.run.iterdir()] == [".lock"]


def test_a_dry_run_asks_for_no_lock(place: Place) -> None:
    with held(place.run):
        assert place.main("train", "shapes", "tiny", "--dry-run")[0] == 0
    (place.run / ".lock").unlink()
    assert place.main("train", "shapes", "tiny", "--dry-run")[0] == 0
    assert list(place.run.iterdir()) == []


def test_a_killed_run_is_no_obstacle(place: Place) -> None:
    command = [sys.executable, "-m", "sanctl", "train", "shapes", "tiny", "-o", "TRAIN.workers=2"]
    with subprocess.Popen(
        [*command, "-o", "TRAIN.epochs=1000000", "--progress", "plain"],
        cwd=place.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("epoch epoch=1 ") for line in process.stdout)
        status, _, err = place.main("train", "shapes", "tiny", "--resume", "auto")
        require_refusal(status, err, process.pid)
        process.kill()
    again = ("train", "shapes", "tiny", "--resume", "auto", "--no-test", "-o", "TRAIN.workers=0")
    assert place.main(*again)[0] == 0
    assert not (place.run / ".lock").exists()
