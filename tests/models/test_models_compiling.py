"""Compiled networks: batches of another number of images take the network as it is."""

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sanctl_models import build_model, compile_network


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Count what is compiled, by all of torch.compile but its C++ code, which takes minutes."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize("sa_type", [0, 1], ids=["pairwise", "patchwise"])
def test_a_smaller_batch_is_not_compiled_anew(
    sa_type: int, compilations: CompileCounterWithBackend
) -> None:
    torch.manual_seed(0)
    network = build_model(
        arch="san", sa_type=sa_type, layers=[1, 1], widths=[32, 64], kernels=[3, 5], classes=3
    ).double()
    other = copy.deepcopy(network)
    compiled = compile_network(other, {4})
    for training in (True, False):
        for module in (network, other):
            module.train(training)
        for count in (4, 4, 3):
            images = torch.randn(count, 3, 32, 32, dtype=torch.float64)
            out, expected = compiled(images), network(images)
            torch.testing.assert_close(out, expected)
            if training:
                out.square().sum().backward()
        assert compilations.frame_count == 2 - training
