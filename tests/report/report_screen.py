"""A terminal in a few lines: what stands on it after control sequences have been obeyed."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import unicodedata

_TOKEN = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r|\n)|([^\x1b\r\n]+)")


class Screen:
    """Knows the sequences that a live display needs, and fails on any other.

    Attributes:
        lines: the text of every line, from the first one written.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines = [""]
        self.shows_cursor = True
        self._row = 0
        self._column = 0

    def feed(self, text: str) -> None:
        """Obey what was written to the terminal."""
        end = 0
        for match in _TOKEN.finditer(text):
            assert match.start() == end, f"not understood: {text[end : end + 20]!r}"
            end = match.end()
            argument, command, line_end, plain = match.groups()
            if plain is not None:
                self._write(plain)
            elif line_end is not None:
                self._move(line_end)
            else:
                self._obey(argument, command)
        assert end == len(text), f"not understood: {text[end : end + 20]!r}"

    def resize(self, width: int) -> None:
        """Become narrower: longer lines go on in further rows, as many terminals show them."""
        folded: list[str] = []
        for number, line in enumerate(self.lines):
            text = line.rstrip()
            folded += [text[i : i + width] for i in range(0, max(1, len(text)), width)]
            if number == self._row:
                self._row, self._column = len(folded) - 1, min(self._column % width, width - 1)
        self.width, self.lines = width, folded

    def _move(self, line_end: str) -> None:
        if line_end == "\r":
            self._column = 0
            return
        self._row += 1
        self._column = 0
        if self._row == len(self.lines):
            self.lines.append("")

    def _obey(self, argument: str, command: str) -> None:
        if command == "A":
            self._row = max(0, self._row - int(argument or 1))
        elif command == "K":
            assert argument == "2"
            self.lines[self._row] = ""
        elif command == "H":
            assert argument == ""
            self._row = self._column = 0
        elif command == "J":
            assert argument == "2"
            self.lines = [""] * len(self.lines)
        elif argument == "?25":
            self.shows_cursor = command == "h"
        else:
            assert command == "m", f"not understood: {argument}{command}"

    def _write(self, text: str) -> None:
        for char in text:
            if self._column == self.width:
                self._move("\n")
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + char + line[self._column + 1 :]
            self._column += 2 if unicodedata.east_asian_width(char) in "WF" else 1

    def text(self) -> str:
        """All lines, without blanks at their ends."""
        return "\n".join(line.rstrip() for line in self.lines)


def on_terminal(program: str, width: int = 80, **environment: str) -> str:
    """Run a program on a terminal of its own and return everything that it wrote there."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"}
    }
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**clean, "TERM": "xterm-256color", **environment},
    )
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert process.wait() == 0, written.decode()
    return written.decode()
