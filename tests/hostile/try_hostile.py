"""Open every hostile file in this process, which may only grow by so much, and say what happened.

Called with a folder; prints a line of JSON for each file. A process of its own, since what is
watched here, and the limit on memory, cannot be taken back.
"""

import contextlib
import io
import json
import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bad_images import PNG, snapshot
from hostile_files import MAKERS

ROOM = 2 << 30
EXECUTIONS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")


@dataclass
class Outcome:
    """What a hostile file did.

    Attributes:
        name: Which file.
        status, out, err: What the command ended with and wrote.
        executions: Programs that were started.
        reads: Files outside the data's folder that were opened.
        changed: Whether any file was written, changed or removed.
        grown: By how many bytes the process has grown at most.
    """

    name: str
    status: int = -1
    out: str = ""
    err: str = ""
    executions: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    changed: bool = False
    grown: int = 0

    @property
    def harmless(self) -> bool:
        """Whether it was refused in one clear line, and nothing else happened."""
        lines = self.err.splitlines()
        clear = len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable()
        quiet = clear and len(lines[0]) < 700 and "unexpected" not in lines[0]
        did = self.executions or self.reads or self.changed or self.grown > ROOM // 4
        return self.status == 2 and quiet and not did


_now: list[Outcome] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _now:
        return
    if event in EXECUTIONS:
        _now[0].executions.append(f"{event} {arguments}"[:200])
    elif event in ("open", "os.listdir", "os.scandir") and arguments:
        path = str(arguments[0])
        if "outside" in path or "/etc/passwd" in path:
            _now[0].reads.append(f"{event} {path}")


def memory(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def try_one(name: str, root: Path) -> Outcome:
    from sanctl.cli.main import main

    outcome = Outcome(name)
    folder = root / "".join(char if char.isalnum() else "_" for char in name)
    folder.mkdir()
    arguments = MAKERS[name](folder)
    places = (folder, root / "outside")
    before = [snapshot(place) for place in places]
    sys.argv = ["sanctl", *arguments]
    out, err = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = memory("VmRSS")
    _now.append(outcome)
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        outcome.status = int(end.code or 0)
    finally:
        _now.clear()
    outcome.grown = memory("VmHWM") - start
    outcome.out, outcome.err = out.getvalue()[-1000:], err.getvalue()[-1000:]
    outcome.changed = [snapshot(place) for place in places] != before
    return outcome


def main() -> None:
    import matplotlib  # noqa: F401 - loaded before the watch, which it would set off
    import torch  # noqa: F401

    import sanctl.engine.testing  # noqa: F401

    root = Path(sys.argv[1])
    (root / "outside").mkdir()
    (root / "outside" / "secret.png").write_bytes(PNG)
    limit = memory("VmSize") + ROOM
    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in MAKERS:
        for line in ({"name": name}, asdict(try_one(name, root))):
            sys.stdout.write(f"{json.dumps(line)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
