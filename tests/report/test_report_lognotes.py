"""What the operators log, as notes."""

import logging
import threading

import pytest

from sanctl.report.lognotes import log_as_notes

OPERATORS = logging.getLogger("sanctl_ops")


def test_what_the_operators_log_becomes_notes() -> None:
    notes: list[str] = []
    with log_as_notes(notes.append):
        OPERATORS.info("compiling %d kernels", 3)
        OPERATORS.warning("falling back: 100 %")
        OPERATORS.debug("of no interest")
        logging.getLogger("another").warning("of no interest")
        thread = threading.Thread(target=OPERATORS.warning, args=("from a thread",))
        thread.start()
        thread.join()
    assert notes == ["compiling 3 kernels", "falling back: 100 %", "from a thread"]


def test_nothing_is_left_behind_even_after_an_error() -> None:
    notes: list[str] = []
    before = OPERATORS.level, list(OPERATORS.handlers)
    with pytest.raises(ZeroDivisionError), log_as_notes(notes.append):
        raise ZeroDivisionError
    assert (OPERATORS.level, OPERATORS.handlers) == before
    OPERATORS.warning("too late")
    assert notes == []


def test_without_a_reader_nothing_is_written_beside_the_notes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with log_as_notes(lambda text: None):
        OPERATORS.warning("falling back")
    assert capfd.readouterr() == ("", "")
