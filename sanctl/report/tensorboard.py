"""TensorBoard events under the tags of the original: loss_train, top1_val, learning_rate, ..."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from sanctl.report.records import EpochRecord, RunInfo
from sanctl.report.reporter import Reporter


class TensorBoardReporter(Reporter):
    """Writes an event per value and epoch; the x axis is the epoch, counted from 1.

    A run that goes on from epoch n tells TensorBoard to forget what earlier files hold of epoch n
    and later. Where the events cannot be written, training goes on, and the next epoch starts
    another file with what is missing.

    tensorboardX's `SummaryWriter` hands events to a thread; when that thread meets a full disk
    it dies, and the writer then blocks for ever. So this writes with the `EventsWriter` beneath.

    Args:
        folder: Where the event files go; made where it is missing.
        warn: Takes one sentence when the events could not be written (once until they can be
            again).
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._warn = warn
        self._failed = False
        self._writer: EventsWriter | None = None
        self._unwritten: list[Event] = []

    def run_started(self, info: RunInfo) -> None:
        """Forget the epochs that this run does again."""
        restart = SessionLog(status=SessionLog.START)
        self._unwritten.append(
            Event(step=info.first_epoch, wall_time=time.time(), session_log=restart)
        )

    def epoch_finished(self, record: EpochRecord) -> None:
        """Write the epoch's values."""
        now = time.time()
        self._unwritten += [
            Event(step=record.epoch, wall_time=now, summary=scalar(tag, value))
            for tag, value in _tags(record)
        ]
        self._write()

    def _write(self) -> None:
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # tensorboardX names files by the second: two in one second would be one.
                self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            for event in self._unwritten:
                self._writer.write_event(event)
            self._writer.flush()
            self._unwritten.clear()
        except OSError as error:
            self._writer = None
            if not self._failed:
                self._warn(
                    f"{self._folder}: TensorBoard events cannot be written ({error.strerror}); "
                    "training goes on, and every epoch tries again"
                )
            self._failed = True
        else:
            self._failed = False

    def close(self) -> None:
        """Close the event file; each epoch is already in it."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()


def _tags(record: EpochRecord) -> Iterator[tuple[str, float]]:
    for column, value in record.values.items():
        if column.endswith(("_train", "_val")):
            yield column, value
        elif column == "lr":
            yield "learning_rate", value
