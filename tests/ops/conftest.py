"""Fixtures of the operators' tests."""

from collections.abc import Iterator

import pytest
import torch
from kernels_on_cpu import Launcher, take_cpu_for_gpu


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Without what earlier runs compiled: the caches do not see a change in an operator."""
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def _kernels_on_cpu(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the operators take the CPU for a GPU, and torch fill new memory with NaN."""
    take_cpu_for_gpu(monkeypatch, launcher)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
