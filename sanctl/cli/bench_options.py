"""What the two benchmarks have in common on the command line: choices, files, figures."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanctl.errors import UserError

if TYPE_CHECKING:
    import torch

    from sanctl.bench.export import Row
    from sanctl_ops import Choice

JsonFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write all figures to a JSON file.")
]
CsvFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write all figures to a CSV file.")
]


def require_known(option: str, name: str, known: Sequence[str]) -> str:
    """Return the value of an option if it is one of those that there are.

    Raises:
        UserError: It is not.
    """
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(known)}"
    raise UserError(f"{option} {name}: unknown; {hint}")


def chosen(option: str, given: Iterable[str], known: Sequence[str]) -> list[str]:
    """Resolve a repeatable option whose values may also be joined by commas.

    Args:
        option: Its name, for the error.
        given: What the user gave.
        known: What there is.

    Returns:
        The values, each once, in the order in which they were given.

    Raises:
        UserError: One of them is unknown.
    """
    return [require_known(option, name, known) for name in listed(given)]


def listed(given: Iterable[str]) -> list[str]:
    """Return the values of a repeatable option that may also be joined by commas, each once."""
    return list(dict.fromkeys(name.strip() for text in given for name in text.split(",")))


def require_places(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before a long run and not after it.

    Raises:
        UserError: A path is a folder, or lies in something that is none or that is read-only.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        folder = next(each for each in path.absolute().parents if each.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{path}: {folder} is no folder to write to; choose another")


def open_device(name: str | None, backend: str | None) -> "tuple[torch.device, Choice]":
    """Choose the device, with the arithmetic that training has on it.

    Args:
        name: --device.
        backend: --backend; None for what is set already.

    Returns:
        The device, and what runs the operators there.

    Raises:
        UserError: The machine does not have the device, or the backend cannot run there.
    """
    from sanctl.bench.backends import backend_set
    from sanctl.config.schema import TrainConfig
    from sanctl.engine.device import choose_device, prepare_backends

    with backend_set("torch"):  # which runs anywhere
        device = choose_device(name, [0])
    choice = choose_operators(device, backend)
    prepare_backends(TrainConfig(manual_seed=0), device)
    return device, choice


def choose_operators(device: "torch.device", backend: str | None) -> "Choice":
    """Choose what runs the operators on a device; say so where it is not the kernels of a GPU.

    Args:
        device: Where they run.
        backend: --backend; None for what is set already.

    Raises:
        UserError: The backend cannot run there.
    """
    from sanctl.bench.backends import backend_set
    from sanctl.engine.device import operators_backend
    from sanctl_ops import requested_backend

    with backend_set(backend):
        try:
            choice = operators_backend(device)
        except UserError as error:
            raise UserError(f"--backend {backend}: {error}" if backend else str(error)) from None
        if device.type == "cuda" and choice.name == "torch" and requested_backend() == "auto":
            because = "; ".join(filter(None, (choice.reason, choice.mend)))
            note(f"the cupy backend cannot run: {because}")
    return choice


def note(text: str) -> None:
    """Print what the user should know beside the result."""
    from sanctl.report.console import err

    err.print(f"note: {text}")


def write_files(json: Path | None, csv: Path | None, about: "Row", rows: "Sequence[Row]") -> None:
    """Write the files that were asked for, and say so."""
    from sanctl.bench.export import write_csv, write_json
    from sanctl.report.console import out, printable

    for file, write in ((json, write_json), (csv, write_csv)):
        if file is not None:
            write(file, about, rows)
            out.print(f"wrote {printable(str(file))}")


def figure(value: float | None, scale: float = 1) -> str | None:
    """Return a figure times `scale` in three significant digits, without an exponent."""
    return None if value is None else f"{float(f'{value * scale:.3g}'):.12g}"
