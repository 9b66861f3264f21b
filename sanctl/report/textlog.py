"""`train.log`: the plain lines of a run with the time of each, across resumes."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from sanctl.report.plain import PlainReporter


class TextLogReporter(PlainReporter):
    """Appends the plain lines to a file; training goes on where that cannot be written.

    Args:
        path: The log file; its folder is made where it is missing.
        print_freq: Steps between two lines.
        warn: Takes one sentence when a line could not be written (once until one can be again).
    """

    def __init__(self, path: Path, print_freq: int, warn: Callable[[str], None]) -> None:
        super().__init__(print_freq, self._append)
        self._path = path
        self._warn = warn
        self._failed = False

    def _append(self, line: str) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each line: what is written is in the file, whatever happens next.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{now} {line}\n")
        except OSError as error:
            if not self._failed:
                self._warn(f"{self._path}: cannot be written ({error.strerror}); training goes on")
            self._failed = True
        else:
            self._failed = False
