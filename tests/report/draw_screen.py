"""Draws `.github/screen.svg`, the README's picture of a run on a terminal, from a real run.

It prepares the demo's dataset in a temporary folder, trains on it in a terminal (tmux), and keeps
what stands on that terminal in the middle of the fifth epoch. The host's name is `laptop`, by a UTS
namespace of its own (unshare). Arguments go to `sanctl train`:

    python tests/report/draw_screen.py --device cpu --nproc 2
"""

import io
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from sanctl.cli.demo import DRAWINGS, IMAGES_PER_CLASS, SEED, story
from sanctl.data.drawings import draw_dataset

PICTURE = Path(__file__).parents[2] / ".github" / "screen.svg"
WIDTH, HEIGHT = 96, 24
MOMENT = re.compile(r"epoch +5/6 .*\ntrain +(2[0-9])/40 ")
SECONDS = 600
# Processes meet on the loopback interface, since no name server knows that name.
ON_LAPTOP = (
    "GLOO_SOCKET_IFNAME=lo unshare --map-root-user --uts sh -c 'hostname laptop && exec \"$@\"' sh"
)


def tmux(*arguments: str) -> str:
    done = subprocess.run(
        ["tmux", "-L", "sanctl-screen", *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


def sanctl(command: str) -> str:
    return command.replace("sanctl", f"{shlex.quote(sys.executable)} -m sanctl", 1)


def prepare(folder: Path) -> str:
    """Make the demo's dataset and configuration; return the command that trains on it."""
    draw_dataset(folder / DRAWINGS, IMAGES_PER_CLASS, SEED)
    *commands, train, _ = story(None)
    for command in commands:
        subprocess.run(sanctl(command), shell=True, check=True, cwd=folder)
    return train


def watch(folder: Path, command: str) -> str:
    """Train in a terminal, and return what stands on it at the moment of the picture."""
    size = ("-x", str(WIDTH), "-y", str(HEIGHT))
    inside = f"{ON_LAPTOP} {sanctl(command)}"
    tmux("new-session", "-d", *size, "-c", str(folder), inside)
    try:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if MOMENT.search(tmux("capture-pane", "-p")):
                return tmux("capture-pane", "-p", "-e")
            time.sleep(0.1)
        raise TimeoutError(tmux("capture-pane", "-p"))
    finally:
        tmux("kill-server")


def save(screen: str, command: str) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen.rstrip()))
    # Without its fonts from elsewhere: a picture should fetch nothing.
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(
        console.export_svg(title=command, code_format=form, unique_id="screen"), encoding="utf-8"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        command = shlex.join([*prepare(Path(name)).split(), *sys.argv[1:]])
        save(watch(Path(name), command), command)
