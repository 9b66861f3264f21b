"""Rounds of a network in `bench-models`: warmed up, timed, and why a network cannot run.

Times are wall-clock times between two moments at which the device has nothing left to do; on a
GPU, two steps that are not timed come first in each round.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from sanctl.bench.network import ModelSettings, RunningNetwork, resolve
from sanctl.bench.timing import is_out_of_memory, synchronize
from sanctl_models import create_model, min_input_size

_STEPS = {"cuda": 10, "cpu": 1}
_UNTIMED_STEPS = {"cuda": 2, "cpu": 0}


def warm_up(network: RunningNetwork, device: torch.device) -> int | None:
    """Run the steps in which a network compiles, tunes itself, and finds or records its memory.

    Returns:
        The most bytes that a step after the first one held, of this network alone: its weights,
        optimizer's state and batch, and what was allocated on top. None on a CPU. Where steps are
        recorded in a CUDA graph, that is the one that allocates; later ones use its memory.
    """
    network.step()
    synchronize(device)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(_UNTIMED_STEPS["cuda"]):
        network.step()
    synchronize(device)
    return network.held_bytes() + torch.cuda.max_memory_allocated(device) - before


def time_round(network: RunningNetwork, device: torch.device) -> float:
    """Run a network for a round; return the mean time of a step in seconds."""
    for _ in range(_UNTIMED_STEPS[device.type]):
        network.step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(_STEPS[device.type]):
        network.step()
    synchronize(device)
    return (time.perf_counter() - start) / _STEPS[device.type]


def too_small(label: str, settings: ModelSettings) -> str:
    """Say that the images are too small for a network; empty where they are not."""
    name, _ = resolve(label, settings)
    with torch.device("meta"):
        smallest = min_input_size(create_model(name))
    return f"needs images of at least {smallest} px" if settings.size < smallest else ""


def failure_of(action: Callable[[], object]) -> str:
    """Do something; say that memory did not suffice, or that a batch was too small, or nothing."""
    try:
        action()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return "out of memory"
    except ValueError as error:  # of batch normalisation, where there is but one value
        return str(error)
    return ""


def give_memory_back(device: torch.device) -> None:
    """Give back to the GPU what a network that failed has left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def room_to_compile(
    labels: Sequence[str], settings: ModelSettings
) -> AbstractContextManager[object]:
    """Let torch.compile keep the code of several networks, which share their `forward`."""
    if not any(resolve(label, settings)[1].compiled for label in labels):
        return nullcontext()
    from torch._dynamo import config

    return config.patch(recompile_limit=config.recompile_limit + len(labels))
