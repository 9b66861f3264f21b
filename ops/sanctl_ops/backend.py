"""Which code an operator runs: the CuPy kernels or the formulas in torch, and why."""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

REQUESTS = ("auto", "cupy", "torch")
VARIABLE = "SANCTL_OPS_BACKEND"
CACHE_VARIABLE = "CUPY_CACHE_DIR"
OLDEST_COMPUTE_CAPABILITY = (8, 0)
CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
"""The packages that provide CuPy: the extras of sanctl, and the one built from source."""

_logger = logging.getLogger("sanctl_ops")
_requested: str | None = None
_told: set[str] = set()


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run, or there is none of that name."""


@dataclass(frozen=True)
class Choice:
    """The backend of the operators on one device.

    Attributes:
        name: "cupy" or "torch".
        reason: why, in one line.
        mend: the command or the change that would make the kernels run; empty where they do, and
            where nothing would.
    """

    name: str
    reason: str
    mend: str = ""


def set_backend(name: str) -> None:
    """Choose what runs the operators from now on, in place of the variable SANCTL_OPS_BACKEND.

    Args:
        name: "auto", the kernels where they can run and the formulas elsewhere; "cupy", the kernels
            or an error; "torch", the formulas.

    Raises:
        BackendError: there is no backend of that name.
    """
    global _requested
    _requested = _known(name, "the backend")


@contextmanager
def use_backend(name: str | None = None) -> Iterator[None]:
    """Choose as `set_backend` does for a block; afterwards the choice is what it was before.

    Args:
        name: "auto", "cupy" or "torch"; None leaves what is chosen already.

    Raises:
        BackendError: there is no backend of that name.
    """
    global _requested
    before = _requested
    if name is not None:
        set_backend(name)
    try:
        yield
    finally:
        _requested = before


def requested_backend() -> str:
    """Return "auto", "cupy" or "torch": from `set_backend`, else SANCTL_OPS_BACKEND, else "auto".

    Raises:
        BackendError: the variable names no backend.
    """
    if _requested is not None:
        return _requested
    return _known(os.environ.get(VARIABLE) or "auto", VARIABLE)


def choose_backend(device: torch.device) -> Choice:
    """Return what runs the operators on tensors of this device.

    Raises:
        BackendError: the kernels are asked for by name and cannot run there.
    """
    request = requested_backend()
    if request == "torch":
        return Choice("torch", "asked for")
    obstacle = _obstacle(device)
    if obstacle is None:
        return Choice("cupy", "asked for" if request == "cupy" else "CuPy sees this GPU")
    if request == "cupy":
        mend = obstacle.mend or f"choose auto or torch with {VARIABLE}"
        raise BackendError(f"the cupy backend cannot run: {obstacle.reason}; {mend}")
    return obstacle


def runs_kernels(device: torch.device) -> bool:
    """Tell whether the operators run the CuPy kernels there; log, once, why they do not on a GPU.

    Raises:
        BackendError: the kernels are asked for by name and cannot run there.
    """
    choice = choose_backend(device)
    falls_back = choice.name == "torch" and requested_backend() == "auto"
    if falls_back and device.type == "cuda" and choice.reason not in _told:
        _told.add(choice.reason)
        because = "; ".join(filter(None, (choice.reason, choice.mend)))
        _logger.warning("attention runs on torch formulas, not on the CuPy kernels: %s", because)
    return choice.name == "cupy"


def installed_cupy() -> dict[str, str]:
    """Return the version of every installed package that provides CuPy, by the package's name."""
    found = {}
    for package in CUPY_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _known(name: str, what: str) -> str:
    if name not in REQUESTS:
        raise BackendError(f"{what} must be one of {', '.join(REQUESTS)}, got {name!r}")
    return name


def _obstacle(device: torch.device) -> Choice | None:
    """Return what keeps the kernels from running on this device, as the choice it leads to."""
    if device.type != "cuda":
        return Choice("torch", f"the kernels need a CUDA device, not {device.type}")
    return _gpu_obstacle(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _gpu_obstacle(index: int) -> Choice | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_COMPUTE_CAPABILITY:
        version = ".".join(map(str, capability))
        return Choice(
            "torch", f"the kernels need compute capability 8.0 or newer, this GPU has {version}"
        )
    return _cupy_obstacle(index)


def _cupy_obstacle(index: int) -> Choice | None:
    try:
        cupy = importlib.import_module("cupy")
        seen = cupy.cuda.runtime.getDeviceCount()
    # A broken CuPy raises whatever its libraries raise, ImportError being the usual one.
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        reason = "CuPy is not installed" if missing else f"CuPy fails: {_cause(error)}"
        # It makes the folder of its compiled kernels when it is imported.
        no_folder = isinstance(error, OSError)
        mend = f"set {CACHE_VARIABLE} to a folder that can be written" if no_folder else ""
        return Choice("torch", reason, mend or install_command())
    if index >= seen:
        return Choice("torch", f"CuPy sees {seen} GPUs, not cuda:{index}")
    return None


def _cause(error: BaseException) -> str:
    """Return one line about an error, or about the first of those that led to it.

    CuPy wraps the error of the library that it cannot load into a page of advice.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def install_command() -> str:
    """Return the command that installs the CuPy built for torch's CUDA, and nothing beside it."""
    major = (torch.version.cuda or "13").partition(".")[0]
    install = f"pip install 'sanctl[cuda{major}]'"
    # pip would leave a broken one as it is, and one for another CUDA beside the new one.
    present = " ".join(installed_cupy())
    return f"pip uninstall -y {present} && {install}" if present else install
