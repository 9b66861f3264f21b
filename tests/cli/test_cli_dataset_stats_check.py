"""`sanctl dataset stats` and `check` as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from sanctl.cli.dataset import app
from sanctl.data.index import index_folder, save_index
from sanctl.errors import UserError


def sanctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a real process, with pipes for its output."""
    run = subprocess.run(
        [sys.executable, "-m", "sanctl", *arguments], capture_output=True, text=True
    )
    for text in (run.stdout, run.stderr):
        assert "Traceback" not in text
        assert text.replace("\n", "").isprintable()
    return run


class Run(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str
    exception: BaseException | None


def invoke(*arguments: str) -> Run:
    """Run a command in this process, which need not import everything anew."""
    run = CliRunner().invoke(app, arguments)
    return Run(run.exit_code, run.stdout, run.stderr, run.exception)


def table(text: str) -> dict[str, list[str]]:
    """Rows of a table by their first cell; cells stand at least two blanks apart."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """30 classes: the first has 2 images, the next 3, and so on to 11, then 5 each."""
    rng = np.random.default_rng(1)
    for k in range(30):
        for i in range(2 + k if k < 10 else 5):
            path = tmp_path / "images" / f"class{k:02}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), rng.integers(0, 256, (9, 11), np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stats(root: Path) -> None:
    run = invoke("stats", "images", "--json", "a.json", "--csv", "a.csv")
    assert run.exit_code == 0
    rows = table(run.stdout)
    assert rows["images"] == ["165"]
    assert rows["classes"] == ["30"]
    assert rows["most / least"] == ["5.50"]
    assert rows["formats"] == ["PNG 165"]
    lines = run.stdout.splitlines()
    assert "The 10 smallest of 30 classes" in lines
    smallest = lines[lines.index("The 10 smallest of 30 classes") + 2 :]
    assert smallest[0].split() == ["class00", "2"]
    largest = lines[lines.index("The 10 largest") + 2 :]
    assert largest[0].split() == ["class09", "11"]
    assert "  grayscale: true" in lines
    assert len((root / "a.csv").read_text().splitlines()) == 31
    mean = json.loads((root / "a.json").read_text())["all"]["mean"]
    assert f"  mean: [{mean[0]:.4f}]" in lines
    assert "measure all: 165/165" in run.stderr


def test_stats_of_the_parts_of_the_only_dataset(root: Path) -> None:
    index, _ = index_folder(root / "images")
    home = root / "dataset" / "few"
    for part, samples in (("train", range(5)), ("val", range(5, 9))):
        (root / "images" / index.samples[5][0]).write_bytes(b"broken")
        save_index(index.subset(samples), home / f"{part}_init.pt")
    run = invoke("stats", "--grayscale", "--workers", "2", "--allow-outside")
    assert run.exit_code == 0
    rows = table(run.stdout)
    assert rows["images"] == ["5", "4"]
    assert rows["unreadable"] == ["0", "1"]
    assert len(rows["mean"]) == 2
    assert "sanctl dataset check" in run.stderr


def test_check_of_clean_images_prints_one_line(root: Path) -> None:
    run = invoke("check", "images")
    assert run.exit_code == 0
    assert run.stdout == "165 images: no damage, no duplicates, no image in two parts\n"


def test_check_names_what_it_finds(root: Path) -> None:
    images = root / "images"
    truncated = images / "class01" / "0.png"
    truncated.write_bytes(truncated.read_bytes()[:-30])
    (images / "class02" / "1.png").write_bytes(b"")
    copy = images / "class09" / "new\nline.png"
    copy.write_bytes((images / "class08" / "3.png").read_bytes())
    index, _ = index_folder(images)
    save_index(index, root / "data_init.pt")
    for part in ("train", "val"):
        save_index(index.subset(range(len(index) - 40, len(index) - 30)), root / f"{part}_init.pt")

    run = sanctl("dataset", "check", "images")
    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        "damaged (all): images/class01/0.png: the file is truncated",
        "damaged (all): images/class02/1.png: the file has zero bytes",
        "duplicate (all): images/class08/3.png = images/class09/new\\nline.png; "
        "of different classes: class08, class09",
        "166 images: 2 damaged, 1 groups of duplicates, 0 groups in several parts",
    ]
    again = invoke("check")
    assert again.exit_code == 1
    leaks = [line for line in again.stdout.splitlines() if line.startswith("leak: ")]
    assert len(leaks) == 10
    assert all("(train) = " in line and line.endswith("(val)") for line in leaks)


@pytest.mark.parametrize("command", ["stats", "check"])
@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_that_is_missing_or_no_dataset(command: str, folder: str, root: Path) -> None:
    (root / "empty").mkdir()
    run = invoke(command, folder)
    assert isinstance(run.exception, UserError)
    assert folder in str(run.exception)
    assert "\n" not in str(run.exception)
