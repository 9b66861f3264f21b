"""Which code runs the operators: real processes, with the variable set and with broken CuPys."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sanctl_ops import backend

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CHOOSE = """
import sys
import torch
from sanctl_ops import aggregation, backend
choice = backend.choose_backend(torch.device("cpu"))
x, w = torch.ones(1, 2, 4, 4), torch.ones(1, 1, 9, 16)
total = int(aggregation(x, w, 3, padding=1, pad_mode="zero").sum())
print(choice.name, backend.runs_kernels(x.device), total, choice.reason, sep="|")
assert "cupy" not in sys.modules, "imported for a CPU"
"""
TOTAL = 200  # 2 channels of 4 corners with 4 taps inside the image, 8 edges with 6, 4 pixels with 9

NEEDS_GPU = "the kernels need a CUDA device, not cpu"
NAMES = "must be one of auto, cupy, torch, got"


def python(
    program: str, variable: str | None = None, path: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a program with SANCTL_OPS_BACKEND set, and with a folder of packages before all others.

    Args:
        program: Python source.
        variable: The value of SANCTL_OPS_BACKEND; None leaves it unset.
        path: The folder.
        more: Other variables of the environment.
    """
    environment = {k: v for k, v in os.environ.items() if k != backend.VARIABLE} | more
    if variable is not None:
        environment[backend.VARIABLE] = variable
    if path is not None:
        paths = (str(path), os.environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("variable", "reason"),
    [(None, NEEDS_GPU), ("", NEEDS_GPU), ("auto", NEEDS_GPU), ("torch", "asked for")],
)
def test_a_cpu_runs_the_formulas_and_says_nothing(variable: str | None, reason: str) -> None:
    done = python(CHOOSE, variable)
    assert (done.stdout, done.stderr) == (f"torch|False|{TOTAL}|{reason}\n", "")


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "cupy",
            f"the cupy backend cannot run: {NEEDS_GPU}; "
            "choose auto or torch with SANCTL_OPS_BACKEND",
        ),
        ("nonsense", f"SANCTL_OPS_BACKEND {NAMES} 'nonsense'"),
        ("CUPY", f"SANCTL_OPS_BACKEND {NAMES} 'CUPY'"),
    ],
)
def test_a_backend_that_is_not_to_be_had(variable: str, message: str) -> None:
    done = python(CHOOSE, variable)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == f"sanctl_ops.backend.BackendError: {message}"


@pytest.mark.parametrize(
    "call",
    [
        "aggregation(x, torch.ones(1, 1, 9, 4), 3)",
        "concatenation(x, x, 3)",
        "subtraction2(x, x, 3)",
        "subtraction(x, 3)",
    ],
)
def test_no_operator_runs_on_a_cpu_when_the_kernels_are_asked_for(call: str) -> None:
    program = (
        "import torch\nfrom sanctl_ops import *\n"
        f"set_backend('cupy')\nx = torch.ones(1, 2, 4, 4)\n{call}"
    )
    line = python(program, "torch").stderr.splitlines()[-1]
    assert line.startswith("sanctl_ops.backend.BackendError: the cupy backend cannot run: ")


@pytest.mark.parametrize(
    ("variable", "name", "reason"),
    [
        (None, "torch", "asked for"),
        ("cupy", "auto", NEEDS_GPU),
        ("torch", "auto", NEEDS_GPU),
        ("nonsense", "torch", "asked for"),
    ],
)
def test_set_backend_overrides_the_variable(variable: str | None, name: str, reason: str) -> None:
    done = python(f"import sanctl_ops\nsanctl_ops.set_backend({name!r})\n{CHOOSE}", variable)
    assert (done.stdout, done.stderr) == (f"torch|False|{TOTAL}|{reason}\n", "")


def test_an_unknown_name_changes_nothing() -> None:
    before = backend.requested_backend()
    with pytest.raises(backend.BackendError, match=f"the backend {NAMES} 'triton'"):
        backend.set_backend("triton")
    assert backend.requested_backend() == before


BROKEN = {
    "missing": (
        "raise ModuleNotFoundError(\"No module named 'cupy'\", name='cupy')",
        "CuPy is not installed",
    ),
    "library": (  # as CuPy itself tells it
        "try:\n    raise ImportError('libnvrtc.so.13: cannot open shared object file')\n"
        "except ImportError as error:\n"
        "    raise ImportError('\\n=======\\nFailed to import CuPy.\\n') from error",
        "CuPy fails: libnvrtc.so.13: cannot open shared object file",
    ),
    "dependency": (
        "raise ModuleNotFoundError(\"No module named 'fastrlock'\", name='fastrlock')",
        "CuPy fails: No module named 'fastrlock'",
    ),
    "silent": ("raise ImportError", "CuPy fails: ImportError"),
    "driver": (
        "class cuda:\n class runtime:\n  def getDeviceCount():\n"
        "   raise RuntimeError('cudaErrorInsufficientDriver: too old\\nfor this runtime')",
        "CuPy fails: cudaErrorInsufficientDriver: too old",
    ),
    "blind": (
        "class cuda:\n class runtime:\n  getDeviceCount = staticmethod(lambda: 0)",
        "CuPy sees 0 GPUs, not cuda:0",
    ),
}
each_broken = pytest.mark.parametrize("kind", BROKEN)


def broken_cupy(folder: Path, kind: str) -> str:
    """Write a package `cupy` that fails in this way; return the reason that is to be told."""
    source, reason = BROKEN[kind]
    (folder / "cupy").mkdir()
    (folder / "cupy" / "__init__.py").write_text(source)
    return reason


def told_to_install(kind: str, text: str) -> bool:
    """Whether a text is as it should be: a command for pip, but where that would mend nothing."""
    return ("pip install 'sanctl[cuda" in text) == (kind != "blind")


@pytest.fixture
def _cupy_not_imported() -> Iterator[None]:
    before = sys.modules.pop("cupy", None)
    yield
    sys.modules.pop("cupy", None)
    if before is not None:
        sys.modules["cupy"] = before


@each_broken
@pytest.mark.usefixtures("_cupy_not_imported")
def test_what_keeps_cupy_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    reason = broken_cupy(tmp_path, kind)
    monkeypatch.syspath_prepend(tmp_path)
    choice = backend._cupy_obstacle(0)
    assert choice is not None
    assert (choice.name, choice.reason) == ("torch", reason)
    assert told_to_install(kind, choice.mend)


def test_a_folder_of_kernels_that_cannot_be_made(tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    folder = tmp_path / "file" / "kernels"
    folder.parent.write_text("")
    program = (
        "from sanctl_ops import backend\nchoice = backend._cupy_obstacle(0)\n"
        "print(choice.reason, choice.mend, sep='|')"
    )
    reason, mend = python(program, CUPY_CACHE_DIR=str(folder)).stdout.rstrip("\n").split("|")
    assert reason.startswith("CuPy fails: ")
    assert str(folder) in reason
    assert mend == "set CUPY_CACHE_DIR to a folder that can be written"


def test_another_cupy_is_removed_before_the_right_one_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "cupy_cuda12x-13.4.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: cupy-cuda12x\nVersion: 13.4.1"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert backend.installed_cupy() == {"cupy-cuda12x": "13.4.1"}
    assert backend.install_command().startswith("pip uninstall -y cupy-cuda12x && pip install ")
    monkeypatch.setattr(sys, "path", [])
    assert backend.installed_cupy() == {}
    major = (torch.version.cuda or "13").partition(".")[0]
    assert backend.install_command() == f"pip install 'sanctl[cuda{major}]'"


FALL_BACK = """
import logging, torch
from sanctl_ops import aggregation
logging.basicConfig(format="%(levelname)s|%(message)s")
x, w = torch.ones(1, 2, 4, 4, device="cuda"), torch.ones(1, 1, 9, 16, device="cuda")
for _ in range(2):
    total = int(aggregation(x, w, 3, padding=1, pad_mode="zero").sum())
print(total)
"""


@pytest.mark.gpu
@on_gpu
@each_broken
def test_a_gpu_without_a_working_cupy_falls_back_and_says_so_once(
    tmp_path: Path, kind: str
) -> None:
    reason = broken_cupy(tmp_path, kind)
    done = python(FALL_BACK, path=tmp_path)
    assert done.stdout == f"{TOTAL}\n"
    (line,) = done.stderr.splitlines()
    level, message = line.split("|")
    assert level == "WARNING"
    assert message.startswith(
        f"attention runs on torch formulas, not on the CuPy kernels: {reason}"
    )
    assert told_to_install(kind, message)


@pytest.mark.gpu
@on_gpu
@each_broken
def test_a_gpu_without_a_working_cupy_refuses_an_explicit_one(tmp_path: Path, kind: str) -> None:
    reason = broken_cupy(tmp_path, kind)
    done = python(FALL_BACK, "cupy", path=tmp_path)
    assert done.returncode != 0
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        f"sanctl_ops.backend.BackendError: the cupy backend cannot run: {reason}; "
    )


@pytest.mark.gpu
@on_gpu
def test_the_formulas_can_be_asked_for_on_a_gpu(tmp_path: Path) -> None:
    broken_cupy(tmp_path, "library")
    done = python(FALL_BACK, "torch", path=tmp_path)
    assert (done.stdout, done.stderr) == (f"{TOTAL}\n", "")
