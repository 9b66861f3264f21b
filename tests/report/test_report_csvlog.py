"""metrics.csv: exact, whole, one file across resumes."""

import csv
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from sanctl.errors import UserError
from sanctl.report.csvlog import CsvReporter

Play = Callable[..., None]
Values = Callable[..., dict[str, float]]


def read(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def test_rows_are_exact(play: Play, epoch_values: Values, tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.csv"
    play(CsvReporter(path, pytest.fail), tmp_path)

    assert read(path) == [epoch_values(epoch) for epoch in range(1, 13)]
    header, first = path.read_text().splitlines()[:2]
    assert header.startswith("epoch,lr,loss_train,top1_train,")
    assert first.startswith("1,0.1,0.3333333333333333,71.0,")
    assert list(pd.read_csv(path)["epoch"]) == list(range(1, 13))


def test_a_numpy_float_is_written_as_a_number(tmp_path: Path) -> None:
    import numpy as np

    from sanctl.report.records import EpochRecord

    path = tmp_path / "metrics.csv"
    CsvReporter(path, pytest.fail).epoch_finished(
        EpochRecord(1, 1, {"epoch": 1, "loss_train": np.float64(0.1)}, best=False)
    )
    assert path.read_text() == "epoch,loss_train\n1,0.1\n"


def test_a_resume_replaces_the_epochs_that_it_does_again(
    play: Play, epoch_values: Values, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.csv"
    play(CsvReporter(path, pytest.fail), tmp_path, last=5)
    play(CsvReporter(path, pytest.fail), tmp_path, first=4, last=6, shift=1.0)

    assert read(path) == [epoch_values(e, 0.0 if e < 4 else 1.0) for e in range(1, 7)]


def test_a_resume_drops_later_rows_before_its_first_epoch_ends(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    play(CsvReporter(path, pytest.fail), tmp_path, last=5)
    play(CsvReporter(path, pytest.fail), tmp_path, first=4, last=3)
    assert [row["epoch"] for row in read(path)] == [1, 2, 3]


def test_a_run_from_the_start_forgets_an_earlier_one(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    play(CsvReporter(path, pytest.fail), tmp_path, last=5)
    play(CsvReporter(path, pytest.fail), tmp_path, last=2)
    assert [row["epoch"] for row in read(path)] == [1, 2]


def test_columns_that_come_later_are_added_at_the_right(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    play(CsvReporter(path, pytest.fail), tmp_path, last=1, validates=False)
    columns = path.read_text().splitlines()[0]
    play(CsvReporter(path, pytest.fail), tmp_path, first=2, last=2)

    assert path.read_text().splitlines()[0].startswith(columns + ",loss_val,")
    first, second = read(path)
    assert "loss_val" not in first
    assert second["loss_val"] > 0


def test_rows_that_hold_no_epoch_are_dropped(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,lr\n1,0.1\n2,0.1,7,8\n\nnonsense\n,\n3")
    play(CsvReporter(path, pytest.fail), tmp_path, first=3, last=3)
    assert [row["epoch"] for row in read(path)] == [1, 2, 3]


def test_a_file_that_is_no_text_is_an_error_and_stays(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(UserError, match=r"metrics\.csv: cannot be read .*move it away"):
        play(CsvReporter(path, pytest.fail), tmp_path, first=3)
    assert path.read_bytes() == b"\xff\xfe\x00garbage"


def test_a_full_disk_warns_keeps_the_old_file_and_loses_no_row(tmp_path: Path) -> None:
    # A limit on the size of files stands in for the full disk.
    program = """
        import resource, sys
        from pathlib import Path
        from sanctl.report.csvlog import CsvReporter
        from sanctl.report.records import EpochRecord

        def room(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        path = Path(sys.argv[1])
        reporter = CsvReporter(path, lambda text: print("warned:", text))
        for epoch in range(1, 7):
            room(60 if epoch in (4, 5) else resource.RLIM_INFINITY)
            reporter.epoch_finished(
                EpochRecord(epoch, 6, {"epoch": epoch, "loss_train": 1 / 3}, best=False)
            )
            print(epoch, path.read_text().count("\\n") - 1, len(list(path.parent.iterdir())))
        reporter.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path / "metrics.csv"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    warned = [line for line in lines if line.startswith("warned:")]
    assert [line for line in lines if line not in warned] == [
        *["1 1 1", "2 2 1", "3 3 1", "4 3 1", "5 3 1", "6 6 1"]
    ]
    assert len(warned) == 1  # for two epochs
    assert "metrics.csv: cannot be written (File too large); training goes on" in warned[0]
