"""What is read of GPUs, and that machines without any are no error."""

import os
import subprocess
import sys

import pytest
import torch

from sanctl.engine.gpu import GpuMonitor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_a_cpu_has_nothing_to_read() -> None:
    assert GpuMonitor(torch.device("cpu")).read() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_there_is_nothing_to_read() -> None:
    assert GpuMonitor(torch.device("cuda", 0)).read() is None


def test_without_the_library_there_is_nothing_to_read() -> None:
    program = (
        "import sys; sys.modules['pynvml'] = None\n"
        "import torch\n"
        "from sanctl.engine.gpu import GpuMonitor\n"
        "print(GpuMonitor(torch.device('cuda', 0)).read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


@pytest.mark.gpu
@needs_gpu
def test_what_a_gpu_tells_agrees_with_torch() -> None:
    device = torch.device("cuda", 0)
    block = torch.empty(2**30, dtype=torch.uint8, device=device)
    reading = GpuMonitor(device).read()
    assert reading is not None
    free, total = torch.cuda.mem_get_info(device)
    assert reading.memory_total == pytest.approx(total, rel=0.02)
    assert reading.memory_used is not None
    assert reading.memory_used >= len(block)
    assert reading.memory_used == pytest.approx(total - free, rel=0.1, abs=2**30)
    assert reading.utilisation is None or 0 <= reading.utilisation <= 100
    assert reading.power is None or 1 < reading.power < 3000
    assert reading.temperature is None or 0 < reading.temperature < 120


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_the_gpu_is_the_one_that_torch_uses_also_when_others_are_hidden() -> None:
    """Memory is taken on the second GPU, which is the only one that the process sees."""
    program = (
        "import torch; from sanctl.engine.gpu import GpuMonitor\n"
        "monitor = GpuMonitor(torch.device('cuda', 0))\n"
        "before = monitor.read().memory_used\n"
        "block = torch.empty(2**32, dtype=torch.uint8, device='cuda')\n"
        "print(monitor.read().memory_used - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) >= 2**32
