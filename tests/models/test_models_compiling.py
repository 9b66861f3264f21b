"""Compiled networks: batches of another number of images, replicas, and CUDA graphs."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from sanctl_models import build_model, compile_network
from sanctl_models.fusion import use_attention


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
    compiled = compile_network(other, {4}, cuda_graphs=True)
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


def trained(
    network: nn.Module, forward: Callable[[Tensor], Tensor], batches: list[Tensor]
) -> list[Tensor]:
    """Train on batches, all of one class, and return the logits of each step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    logits = []
    for images in batches:
        with torch.autocast("cuda", torch.bfloat16, enabled=images.dtype == torch.float32):
            logits.append(forward(images))
        F.cross_entropy(logits[-1], logits[-1].new_zeros(len(images), dtype=torch.int64)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [out.detach() for out in logits]


@pytest.fixture
def only_process(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """This process is a group of its own, whose backend is the parameter."""
    meeting = (tmp_path / "store").as_uri()
    distributed.init_process_group(request.param, init_method=meeting, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("only_process")
@pytest.mark.parametrize("only_process", ["gloo"], indirect=True)
@pytest.mark.parametrize("replica_first", [False, True])
def test_a_replica_is_compiled_in_pieces_whatever_was_compiled_before(
    replica_first: bool, compilations: CompileCounterWithBackend
) -> None:
    """One piece for each bucket of gradients, so that an exchange overlaps the next gradients."""
    pieces = {}
    for replicated in (replica_first, not replica_first):
        network = build_model(
            arch="san", sa_type=0, layers=[1, 1], widths=[256, 1024], kernels=[3, 3], classes=3
        )
        module = DistributedDataParallel(network, bucket_cap_mb=1) if replicated else network
        before = compilations.frame_count
        compile_network(module, {2}, cuda_graphs=True)(torch.randn(2, 3, 32, 32))
        pieces[replicated] = compilations.frame_count - before
    assert pieces[False] == 1
    assert pieces[True] > 2


@pytest.mark.gpu
@pytest.mark.usefixtures("only_process")
@pytest.mark.parametrize("only_process", ["nccl"], indirect=True)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("replicated", [False, True], ids=["itself", "replica"])
@pytest.mark.parametrize("sa_type", [0, 1], ids=["pairwise", "patchwise"])
@pytest.mark.parametrize(
    ("attention", "dtype", "share"),
    [("primitives", torch.float64, 1e-6), ("auto", torch.float32, 0.1)],
    ids=["primitives", "fused"],
)
def test_cuda_graphs_train_as_a_network_does(
    sa_type: int, replicated: bool, attention: str, dtype: torch.dtype, share: float
) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    network = build_model(
        arch="san", sa_type=sa_type, layers=[1, 1], widths=[64, 128], kernels=[3, 7], classes=5
    )
    network.to("cuda", dtype).to(memory_format=torch.channels_last)
    other = copy.deepcopy(network)
    replica = DistributedDataParallel(other, broadcast_buffers=False) if replicated else other
    trains = compile_network(replica, {8}, cuda_graphs=True)
    evaluates = compile_network(other, {8}, cuda_graphs=True)
    counts = 8, 8, 8, 5, 8, 8
    batches = [torch.randn(count, 3, 64, 64, dtype=dtype, device="cuda") for count in counts]
    with use_attention(attention):
        expected = trained(network, network, batches)
        actual = trained(other, trains, batches)
        # Evaluated in between, the graphs of training keep their memory.
        for module in (network, other):
            module.eval()
        with torch.inference_mode():
            expected += [network(batches[0]) for _ in range(4)]
            actual += [evaluates(batches[0]) for _ in range(4)]
        for module in (network, other):
            module.train()
        expected += trained(network, network, batches[:2])
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
            actual += trained(other, trains, batches[:2])
    for one, wanted in zip(actual, expected, strict=True):
        assert (one - wanted).norm() < share * wanted.norm()
    launches = [event.name for event in run.events() if "GraphLaunch" in event.name]
    assert len(launches) == 4  # the forward and the backward pass of two steps
