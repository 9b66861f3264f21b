import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sanctl import __version__
from sanctl.cli import main as cli
from sanctl.errors import SanctlError, UserError


def sanctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sanctl", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_version() -> None:
    done = sanctl("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sanctl {__version__}\n", "")
    assert importlib.metadata.version("sanctl") == __version__


def test_the_installed_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("sanctl")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout == sanctl("--help").stdout


@pytest.mark.parametrize("arguments", [(), ("dataset",), ("config",)])
def test_a_bare_command_prints_its_help(arguments: tuple[str, ...]) -> None:
    done = sanctl(*arguments)
    assert done.returncode == 2
    assert "Usage: sanctl" in done.stdout + done.stderr
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("train",), ("test",), ("models",), ("doctor",), ("dataset",), ("config",)]
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(arguments: tuple[str, ...], flag: str) -> None:
    done = sanctl(*arguments, flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: {' '.join(['sanctl', *arguments])} " in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["test", "--help"], ["dataset", "--help"]]
)
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    program = (
        "import sys; from sanctl.cli import main\n"
        f"sys.argv = ['sanctl', *{arguments}]\n"
        "try: main.main()\n"
        "finally: print('imported', {'torch', 'cv2', 'pandas', 'numpy', 'torchvision',"
        " 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == "imported set()\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), ("trian", "'train'", "sanctl --help")),
        (("train",), ("Missing argument", "sanctl train --help")),
        (("train", "a", "b", "--epochs", "3"), ("--epochs", "sanctl train --help")),
        (("dataset", "indx"), ("indx", "'index'", "sanctl dataset --help")),
        (("models", "extra"), ("extra", "sanctl models --help")),
        (("train", "nodata", "net"), ("nodata", "config new")),
    ],
)
def test_a_usage_error_is_one_line(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = sanctl(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(place: int) -> None:
    arguments = ["train", "nodata", "net"]
    done = sanctl(*arguments[:place], "--debug", *arguments[place:])
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "UserError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def fail(error: BaseException, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command line whose command raises an error."""

    def broken() -> None:
        raise error

    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("broken")(broken)
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["sanctl", "broken", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.yaml: wrong"), 2, "error: a.yaml: wrong"),
        (SanctlError("disk full"), 1, "error: disk full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "x/y"), 1, "error: x/y: Permission denied"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (
            ZeroDivisionError("by\nzero"),
            1,
            "error: unexpected ZeroDivisionError: by (--debug shows where)",
        ),
        (RuntimeError(), 1, "error: unexpected RuntimeError (--debug shows where)"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_errors_by_kind(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    saved = os.dup(1)  # a broken pipe lets go of stdout
    try:
        assert fail(error, monkeypatch=monkeypatch) == status
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert capfd.readouterr().err == (f"{line}\n" if line else "")


def test_a_reader_that_leaves_is_not_worth_a_word() -> None:
    done = subprocess.run(
        f"{sys.executable} -m sanctl models | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_closed_pipe_from_the_start() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "sanctl", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sanctl", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"
