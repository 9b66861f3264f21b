"""Networks through torch.compile."""

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn


def compile_network(
    network: nn.Module, counts: Collection[int], *, cuda_graphs: bool
) -> Callable[[Tensor], Tensor]:
    """Return the network through torch.compile, for batches of certain numbers of images.

    Each is compiled by itself, once for training and once for evaluation: kernels for any number
    are slower. Batches of other numbers, such as an epoch's last, take the network as it is.

    Args:
        network: maps (N, C, H, W) to logits; C, H and W are always the same.
        counts: each N to compile for.
        cuda_graphs: on a GPU, record what the forward and the backward pass launch, and launch it
            as one from the third pass on. It is the host's time that this saves, tens of
            milliseconds a step. The gradients that a backward pass returns are overwritten by the
            next forward pass: they cannot add up over several.
    """
    recorded = cuda_graphs and next(network.parameters()).is_cuda
    options: dict[str, Any] | None = {"triton.cudagraphs": True} if recorded else None

    # What is compiled of a module is kept for all of its class. A replica would share it with the
    # network that it trains, and be in one piece instead of one for each bucket of gradients.
    @torch.compile(dynamic=False, options=options)
    def compiled(images: Tensor) -> Tensor:
        return cast("Tensor", network(images))

    def forward(images: Tensor) -> Tensor:
        if len(images) not in counts:
            return cast("Tensor", network(images))
        if not recorded:
            return compiled(images)
        torch.compiler.cudagraph_mark_step_begin()
        # The next pass overwrites the logits, which callers may keep.
        return compiled(images).clone()

    return forward
