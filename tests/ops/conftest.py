"""Fixtures of the operators' tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Without what earlier runs compiled: the caches do not see a change in an operator."""
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _same_precision() -> Iterator[None]:
    """Let no test decide for the next one whether products may be rounded."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
