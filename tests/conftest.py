"""A tiny dataset and a user's folder for the tests that train, and what no test leaves behind."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tiny_run import Place, write_dataset

# How long an example takes is the machine's affair.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset, which no test may change."""
    return write_dataset(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def place(tmp_path: Path, shapes: Path) -> Place:
    """A folder with a configuration for it."""
    return Place(tmp_path, shapes)


@pytest.fixture(autouse=True)
def _backend_as_before() -> Iterator[None]:
    """What one test chooses to run the operators is not for the next."""
    from sanctl_ops import use_backend

    with use_backend():
        yield


@pytest.fixture(autouse=True)
def _precision_as_before() -> Iterator[None]:
    """Training rounds products as its configuration says, in the whole process."""
    import torch

    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    allowed, benchmark = cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32, cudnn.benchmark = allowed, benchmark
