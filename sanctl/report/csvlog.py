"""`metrics.csv`: one row per epoch, one file across resumes."""

import csv
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sanctl.errors import UserError
from sanctl.report.records import EpochRecord, RunInfo
from sanctl.report.reporter import Reporter


class CsvReporter(Reporter):
    """Keeps `metrics.csv` complete after every epoch.

    The columns are those of the first row; a value that comes up later adds its column at the
    right. A run that goes on from epoch n drops the rows of epoch n and later, since it does
    these epochs again. Floats are written so that reading gives the same float.

    The file is written whole beside the old one and renamed, so that it is complete at any time;
    where that fails, the rows stay in memory, training goes on, and every epoch tries again.

    Args:
        path: The file; its folder is made where it is missing.
        warn: Takes one sentence when the file could not be written (once until it can be again).
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._failed = False
        self._columns: list[str] = []
        self._rows: list[dict[str, str]] = []

    def run_started(self, info: RunInfo) -> None:
        """Take over the rows of the epochs before the first of this run."""
        self._columns, rows = _read(self._path)
        self._rows = [row for row in rows if _epoch(row) < info.first_epoch]
        if len(self._rows) != len(rows):
            self._write()

    def epoch_finished(self, record: EpochRecord) -> None:
        """Add a row; rows of this epoch and later ones are from before the run went back."""
        row = {"epoch": str(record.epoch)}
        row |= {key: _exact(value) for key, value in record.values.items() if key != "epoch"}
        self._columns += [key for key in row if key not in self._columns]
        self._rows = [before for before in self._rows if _epoch(before) < record.epoch] + [row]
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, "", "ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        beside = self._path.with_name(self._path.name + ".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(text.getvalue(), encoding="utf-8")
            beside.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            if not self._failed:
                self._warn(
                    f"{self._path}: cannot be written ({error.strerror}); training goes on, "
                    "and every epoch tries again"
                )
            self._failed = True
        else:
            self._failed = False


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows of a metrics file; both empty where there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows = list(reader)
            return list(reader.fieldnames or ()), rows
    except FileNotFoundError:
        return [], []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away to go on") from error


def _epoch(row: dict[str, str]) -> float:
    """Return the epoch of a row; infinity for a row that has none, so that it is dropped."""
    try:
        return int(row["epoch"])
    except (KeyError, ValueError):
        return float("inf")


def _exact(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
