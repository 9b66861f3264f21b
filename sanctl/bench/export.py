"""The files of a benchmark: every figure in full precision, and the circumstances."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from sanctl import __version__
from sanctl.data.atomic import atomic_write
from sanctl_ops.backend import installed_cupy

Row = Mapping[str, object]


def circumstances(device: str, settings: Row) -> dict[str, object]:
    """Return what the figures depend on.

    Args:
        device: The device's name.
        settings: The command's options, as they were resolved.

    Returns:
        Date and time (UTC), device, the versions of sanctl, torch, CUDA and CuPy (None where there
        is none), and the settings.
    """
    cupy = [f"{package} {version}" for package, version in installed_cupy().items()]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "sanctl": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cupy": ", ".join(cupy) or None,
        "settings": dict(settings),
    }


def write_json(path: Path, about: Row, rows: Sequence[Row]) -> None:
    """Write an object with what the figures depend on, and the figures as `records`.

    Raises:
        SanctlError: The file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(f"{json.dumps({**about, 'records': list(rows)}, indent=2)}\n".encode())


def write_csv(path: Path, about: Row, rows: Sequence[Row]) -> None:
    """Write a line for every record, which repeats at its end what the figures depend on.

    The settings are one column of JSON.

    Raises:
        SanctlError: The file cannot be written.
    """
    shared = {**about, "settings": json.dumps(about["settings"])}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows[0], *shared], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **shared} for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
