"""What a machine has for training: libraries, processors, GPUs, and what runs the operators."""

import importlib
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sanctl import __version__
from sanctl.engine.device import operators_backend
from sanctl.errors import UserError
from sanctl_ops.backend import CACHE_VARIABLE, installed_cupy


@dataclass(frozen=True)
class Version:
    """A part of the software.

    Attributes:
        name: what people call it.
        text: its version, None where it is missing.
        problem: one line, where it is there and does not work.
    """

    name: str
    text: str | None
    problem: str = ""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        device: as torch counts.
        name: its maker's.
        capability: compute capability, "9.0".
        total, free: memory in bytes; free is None where the device cannot be used.
        problem: one line, where it cannot be used.
    """

    device: torch.device
    name: str
    capability: str
    total: int
    free: int | None
    problem: str = ""


@dataclass(frozen=True)
class Operators:
    """What runs the attention operators on a device.

    Attributes:
        device: the device.
        backend: "cupy" or "torch"; "none" where the one that is asked for cannot run.
        reason: why.
        mend: what would make the kernels run there.
    """

    device: torch.device
    backend: str
    reason: str
    mend: str = ""


@dataclass(frozen=True)
class KernelFolder:
    """The folder where CuPy keeps compiled kernels, which may not exist yet."""

    path: Path
    writable: bool


def software() -> list[Version]:
    """The versions of what a run depends on, each imported as a run would."""
    cupy = ", ".join(f"{version} ({package})" for package, version in installed_cupy().items())
    return [
        Version("sanctl", __version__),
        Version("Python", platform.python_version()),
        Version("torch", torch.__version__),
        _imported("torchvision", lambda: _version_of("torchvision")),
        _imported("OpenCV", lambda: _version_of("cv2")),
        Version("CuPy", cupy or None),
        Version("CUDA of torch", torch.version.cuda),
        _imported("cuDNN", _cudnn_version),
        Version("NVIDIA driver", _driver_version()),
    ]


def _imported(name: str, version: Callable[[], str | None]) -> Version:
    try:
        return Version(name, version())
    # A library that does not fit the others raises whatever comes to its mind.
    except Exception as error:
        return Version(name, None, f"{name} cannot be used: {_first_line(error)}")


def _version_of(module: str) -> str:
    return str(importlib.import_module(module).__version__)


def _cudnn_version() -> str | None:
    number = torch.backends.cudnn.version()
    if number is None:
        return None
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _driver_version() -> str | None:
    """The version of the NVIDIA driver, which torch does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def cpu_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """The machine's memory in bytes, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def gpus() -> list[Gpu]:
    """The CUDA devices that torch counts, each tried out."""
    return [_try_gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def _try_gpu(device: torch.device) -> Gpu:
    name, capability, total = "", "", 0
    try:
        properties = torch.cuda.get_device_properties(device)
        name, total = properties.name, properties.total_memory
        capability = f"{properties.major}.{properties.minor}"
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        problem = f"{device} cannot be used: {_first_line(error)}"
        return Gpu(device, name, capability, total, None, problem)
    return Gpu(device, name, capability, total, free)


def why_no_gpu() -> str:
    """Why torch counts no CUDA device, in its own words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error).partition(". ")[0]
    return "torch counts none"


def operators(device: torch.device) -> Operators:
    """What runs the operators on a device, where nothing need be running."""
    try:
        choice = operators_backend(device)
    except UserError as error:
        return Operators(device, "none", str(error))
    return Operators(device, choice.name, choice.reason, choice.mend)


def compile_kernel(device: torch.device) -> tuple[bool, str]:
    """Compile a kernel for a GPU: whether that worked, and one line about it."""
    from sanctl_ops.kernels.runtime import compile_probe

    try:
        return True, compile_probe(device)
    # Compiler, driver and file system each have errors of their own.
    except Exception as error:
        return False, f"kernels cannot be compiled: {_first_line(error)}"


def kernel_folder() -> KernelFolder | None:
    """Where CuPy keeps compiled kernels, and whether it can; None where there is no CuPy."""
    if not installed_cupy():
        return None
    given = os.environ.get(CACHE_VARIABLE)
    path = Path.home() / ".cupy" / "kernel_cache" if given is None else Path(given)
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return KernelFolder(path, nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
