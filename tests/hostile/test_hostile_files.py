"""Files that somebody hands over to do harm are refused, each in one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_images import PNG
from hostile_data import OUTSIDE, SECRET
from hostile_files import MAKERS
from try_hostile import Outcome

HERE = Path(__file__).parent
PATHS = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}


def try_all(folder: Path) -> list[Outcome]:
    """Open every hostile file in a process of its own, which may only grow by so much."""
    done = subprocess.run(
        [sys.executable, str(HERE / "try_hostile.py"), str(folder)],
        env=os.environ | PATHS,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    last = lines[-1]["name"] if lines else "none"
    assert done.returncode == 0, f"died at {last}: {done.stderr[-2000:]}"
    return [Outcome(**line) for line in lines if "status" in line]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in try_all(tmp_path_factory.mktemp("hostile"))}


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_refused_in_one_line_and_does_nothing(
    outcomes: dict[str, Outcome], name: str
) -> None:
    assert outcomes[name].harmless, outcomes[name]


def test_the_watch_would_see_a_read(tmp_path: Path) -> None:
    """What is allowed is read, and seen to be read."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / SECRET).write_bytes(PNG)
    (folder / "train_init.pt").write_bytes(OUTSIDE["has an absolute path"](folder))
    program = """
import sys
from sanctl.cli.main import main
from try_hostile import Outcome, _now, watch
outcome = Outcome("")
sys.addaudithook(watch)
_now.append(outcome)
try:
    main()
except SystemExit as end:
    sys.exit(f"{end.code} {len(outcome.reads)}")
"""
    for option, expected in (("--allow-outside", "0 1"), ("--workers=0", "2 0")):
        done = subprocess.run(
            [sys.executable, "-c", program, "dataset", "check", ".", option],
            env=os.environ | PATHS,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr.splitlines()[-1] == expected, done.stderr
