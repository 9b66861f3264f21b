"""`sanctl doctor` in processes of its own, on this machine and with parts that do not work."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from sanctl import __version__
from sanctl_ops.backend import installed_cupy

HAS_GPU = torch.cuda.is_available()
WELL = "everything that is here works; see it train with: sanctl demo"


def doctor(path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command with these variables, and with a folder of packages before all others."""
    environment = {k: v for k, v in os.environ.items() if k != "SANCTL_OPS_BACKEND"} | variables
    if path is not None:
        paths = (str(path), os.environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.run(
        [sys.executable, "-m", "sanctl", "doctor"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def rows(text: str) -> dict[str, str]:
    """The rows of two or more cells: the first cell, and the rest of the line."""
    parts = [re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines()]
    return {part[0]: part[1] for part in parts if len(part) == 2}


def test_what_a_healthy_machine_is_told(tmp_path: Path) -> None:
    done = doctor(CUPY_CACHE_DIR=str(tmp_path / "kernels"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == WELL
    told = rows(done.stdout)
    assert told["sanctl"] == __version__
    assert told["Python"] == platform.python_version()
    assert told["torch"] == torch.__version__
    assert told["torchvision"] == torchvision.__version__
    assert told["CUDA of torch"] == (torch.version.cuda or "-")
    assert told["CPU cores"] == str(len(os.sched_getaffinity(0)))
    assert told["SANCTL_OPS_BACKEND"] == "-"
    cupy = [f"{version} ({package})" for package, version in installed_cupy().items()]
    assert told["CuPy"] == (", ".join(cupy) or "-")
    folder = f"compiled kernels are kept in {tmp_path / 'kernels'} (writable)"
    assert (folder in done.stdout.splitlines()) == bool(cupy)
    assert re.fullmatch(r"torch +the kernels need a CUDA device, not cpu", told["cpu"])


def test_a_machine_without_a_gpu_is_told_why() -> None:
    done = doctor(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert re.search(r"^no GPU: \w.*[^.]$", done.stdout, re.MULTILINE)
    assert "cuda:0" not in done.stdout


@pytest.mark.parametrize(
    ("variable", "backend", "message"),
    [
        (
            "cupy",
            "none",
            "the cupy backend cannot run: the kernels need a CUDA device, not cpu; "
            "choose auto or torch with SANCTL_OPS_BACKEND",
        ),
        ("nonsense", "none", "SANCTL_OPS_BACKEND must be one of auto, cupy, torch, got 'nonsense'"),
        ("torch", "torch", "asked for"),
    ],
)
def test_a_backend_that_is_asked_for(variable: str, backend: str, message: str) -> None:
    done = doctor(SANCTL_OPS_BACKEND=variable, CUDA_VISIBLE_DEVICES="")
    told = rows(done.stdout)
    assert told["SANCTL_OPS_BACKEND"] == variable
    assert re.split(r" {2,}", told["cpu"]) == [backend, message]
    refused = backend == "none"
    assert done.returncode == (2 if refused else 0)
    assert done.stderr == (f"error: {message}\n" if refused else "")
    assert (WELL in done.stdout) != refused


def test_a_library_that_does_not_work_is_told_after_the_tables(tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: no such file\\nadvice')")
    done = doctor(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: OpenCV cannot be used: libGL.so.1: no such file\n"
    assert rows(done.stdout)["OpenCV"] == "-"
    assert "because" in done.stdout
    assert WELL not in done.stdout


def test_the_driver_is_the_one_that_its_own_tool_tells(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    tool.chmod(0o755)
    done = doctor(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert rows(done.stdout)["NVIDIA driver"] == "570.86.15"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
class TestOnGpu:
    def test_a_kernel_is_compiled_as_proof(self, tmp_path: Path) -> None:
        pytest.importorskip("cupy")
        done = doctor(CUPY_CACHE_DIR=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        proofs = re.findall(r"^cuda:\d+: subtraction2 compiled .* s$", done.stdout, re.MULTILINE)
        assert len(proofs) == torch.cuda.device_count()
        assert list(tmp_path.iterdir())
        name = torch.cuda.get_device_name(0)
        assert any(line.startswith(f"cuda:0  {name}  ") for line in done.stdout.splitlines())

    def test_falling_back_is_told_with_its_mend(self, tmp_path: Path) -> None:
        (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc.so: no such file')")
        done = doctor(tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"^cuda:0 +torch +CuPy fails: libnvrtc", done.stdout, re.MULTILINE)
        assert re.search(r"^cuda:0: .* pip install 'sanctl\[cuda", done.stdout, re.MULTILINE)

    def test_a_kernel_that_cannot_be_compiled(self, tmp_path: Path) -> None:
        """CuPy counts the GPUs, and has nothing to compile with."""
        (tmp_path / "cupy.py").write_text(
            "class cuda:\n class runtime:\n  getDeviceCount = staticmethod(lambda: 99)\n"
            "def RawModule(**_):\n raise RuntimeError('no compiler\\nadvice')\n"
        )
        done = doctor(tmp_path)
        assert done.returncode == 1
        assert "error: cuda:0: kernels cannot be compiled: no compiler" in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_an_explicit_cupy_that_is_not_to_be_had(self, tmp_path: Path) -> None:
        (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc.so: no such file')")
        done = doctor(tmp_path, SANCTL_OPS_BACKEND="cupy")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: the cupy backend cannot run: CuPy fails: libnvrtc.so")
        assert re.search(r"^cuda:0 +none ", done.stdout, re.MULTILINE)
