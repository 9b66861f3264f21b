"""What a GPU says of itself while it computes, by NVIDIA's management library."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sanctl.report.records import GpuReading

T = TypeVar("T")


class GpuMonitor:
    """Reads utilisation, memory, power and temperature of a process's GPU.

    The GPU is found by its UUID, since torch counts only those of CUDA_VISIBLE_DEVICES and the
    management library counts them all. Nothing here waits for the GPU's work.

    Args:
        device: The device to read. Of a CPU, and where the library or the driver is missing,
            there is nothing to read.
    """

    def __init__(self, device: torch.device) -> None:
        self._library: Any = None
        self._handle: Any = None
        if device.type == "cuda":
            self._open(device)

    def _open(self, device: torch.device) -> None:
        try:
            import pynvml

            uuid = torch.cuda.get_device_properties(device).uuid
            pynvml.nvmlInit()
        # Without a driver each of the three raises an error of its own. The screen can do without.
        except Exception:
            return
        self._library = pynvml
        # A part of a GPU (MIG) has a UUID of its own.
        for kind in ("GPU", "MIG"):
            self._handle = self._try(pynvml.nvmlDeviceGetHandleByUUID, f"{kind}-{uuid}")
            if self._handle is not None:
                return

    def read(self) -> GpuReading | None:
        """The state of the GPU; None where there is none to ask. It never raises."""
        if self._handle is None:
            return None
        nvml = self._library
        rates = self._try(nvml.nvmlDeviceGetUtilizationRates, self._handle)
        memory = self._try(nvml.nvmlDeviceGetMemoryInfo, self._handle)
        milliwatts = self._try(nvml.nvmlDeviceGetPowerUsage, self._handle)
        temperature = self._try(
            nvml.nvmlDeviceGetTemperature, self._handle, nvml.NVML_TEMPERATURE_GPU
        )
        return GpuReading(
            utilisation=None if rates is None else float(rates.gpu),
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            power=None if milliwatts is None else milliwatts / 1000,
            temperature=None if temperature is None else float(temperature),
        )

    def _try(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """What a call returns, or None for what this GPU does not tell."""
        try:
            return function(*arguments)
        except self._library.NVMLError:
            return None
