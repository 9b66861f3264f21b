"""What the machine is found to have, where only odd machines would tell the difference."""

from pathlib import Path

import pytest
import torch

from sanctl.engine import machine

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("given", [True, False])
def test_the_folder_of_kernels_is_the_one_that_cupy_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    cache = pytest.importorskip("cupy.cuda._compiler_cache")
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    if given:
        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "new" / "folder"))
    folder = machine.kernel_folder()
    assert folder is not None
    assert str(folder.path) == cache.DiskKernelCacheBackend()._cache_dir
    assert folder.writable


@pytest.mark.parametrize("below", ["", "kernels", "a/b"])
def test_a_folder_of_kernels_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    pytest.importorskip("cupy")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / below))
    folder = machine.kernel_folder()
    assert folder == machine.KernelFolder(tmp_path / "file" / below, writable=False)


@without_gpu
def test_a_gpu_that_cannot_be_used_is_one_line() -> None:
    gpu = machine._try_gpu(torch.device("cuda", 0))
    assert gpu.free is None
    assert gpu.problem.startswith("cuda:0 cannot be used: ")
    assert "\n" not in gpu.problem


@without_gpu
def test_kernels_cannot_be_compiled_for_a_gpu_that_is_not_there() -> None:
    works, line = machine.compile_kernel(torch.device("cuda", 0))
    assert not works
    assert line.startswith("kernels cannot be compiled: ")
    assert "\n" not in line


def test_the_memory_is_that_of_the_machine() -> None:
    table = Path("/proc/meminfo")
    if not table.exists():
        pytest.skip("no /proc/meminfo")
    (total,) = [line.split() for line in table.read_text().splitlines() if "MemTotal:" in line]
    assert machine.memory() == pytest.approx(int(total[1]) * 1024, rel=1e-3)
