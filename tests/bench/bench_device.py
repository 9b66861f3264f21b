"""The devices of the benchmarks' tests, and what runs the operators there."""

import pytest
import torch

from sanctl_ops import choose_backend, set_backend

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def open_device(name: str) -> tuple[torch.device, list[str]]:
    """Return a device and the backends that can run there."""
    device = torch.device(name)
    set_backend("auto")
    return device, sorted({"torch", choose_backend(device).name})
