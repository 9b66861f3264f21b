"""Processes killed with SIGKILL while they save."""

from pathlib import Path

from killed_saves import kill_savers


def test_what_killed_processes_leave_is_whole_and_cleared_away(tmp_path: Path) -> None:
    counts = kill_savers(tmp_path / "run", kills=12, seed=0)
    assert counts.pop("saves") > 12
    assert counts.pop("cut off") > 0  # some were hit in the middle of a save
    assert counts == {"not cleaned": 0, "missing": 0, "unloadable": 0, "wrong": 0}
