"""The entry point `sanctl`: its commands, and how errors look.

Commands import torch, OpenCV and pandas only when they run, so that `--help` stays instant.
"""

import os
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from sanctl import __version__
from sanctl.cli import config, dataset
from sanctl.cli.bench_models import bench_models
from sanctl.cli.bench_ops import bench_ops
from sanctl.cli.demo import demo
from sanctl.cli.doctor import doctor
from sanctl.cli.models import models
from sanctl.cli.slurm import slurm
from sanctl.cli.test import test
from sanctl.cli.train import train
from sanctl.errors import SanctlError
from sanctl.report.streams import accept_any_name

SIGNALLED = 128  # to which a shell adds the number of the signal that ended a process
INTERRUPTED = SIGNALLED + signal.SIGINT

# The parser's own usage error (an unknown option, a missing argument), wherever typer keeps it.
ParserError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="sanctl",
    help="Train image-recognition networks built on local self-attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sanctl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback behind an error.")
    ] = False,
) -> None:
    """Train image-recognition networks built on local self-attention."""


app.command("demo")(demo)
app.add_typer(dataset.app, name="dataset")
app.add_typer(config.app, name="config")
app.command("train")(train)
app.command("test")(test)
app.command("slurm")(slurm)
app.command("models")(models)
app.command("bench-ops")(bench_ops)
app.command("bench-models")(bench_models)
app.command("doctor")(doctor)


def main() -> NoReturn:
    """Run the command line and exit with its status.

    A user's mistake exits with 2, a failure with 1, a signal with 128 and its number (Ctrl-C: 130);
    each says one line on standard error. `--debug`, anywhere on the line, adds the traceback.
    """
    # Read when torch is first imported. By default threads that wait for each other spin, which on
    # a CPU shared with other programs slows training down several times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Also read then: what torch's C++ warns of when processes lose each other, with its stacks, is
    # told in a line by sanctl.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    accept_any_name()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    status = _run([argument for argument in arguments if argument != "--debug"], debug)
    sys.exit(status)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        status = app(arguments, prog_name="sanctl", standalone_mode=False)
        sys.stdout.flush()
    except SanctlError as error:
        return _complain(str(error), error.exit_status, debug)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader of our pipe has left (`sanctl ... | head`): not worth a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ParserError as error:
        return _complain_about_usage(error, debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 1, debug)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
        return _complain(f"unexpected {what} (--debug shows where)", 1, debug)
    if status == INTERRUPTED:  # newer parsers turn Ctrl-C into this status by themselves
        return _complain("interrupted", INTERRUPTED, debug=False)
    return status if isinstance(status, int) else 0


def _complain_about_usage(error: Exception, debug: bool) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()  # type: ignore[attr-defined]
    if not message:  # a bare `sanctl` or `sanctl dataset`, which has printed its help already
        return 2
    path = context.command_path if context else "sanctl"
    return _complain(f"{message.rstrip('.')} (see {path} --help)", 2, debug)


def _complain(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    from sanctl.report.console import printable

    prefix = "" if status > SIGNALLED else "error: "
    # A message may quote a file, which may hold what a terminal would obey.
    lines = [printable(line) for line in message.split("\n")]
    print(f"{prefix}{chr(10).join(lines)}", file=sys.stderr)
    return status
