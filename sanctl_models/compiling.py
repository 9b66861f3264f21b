"""Networks through torch.compile."""

from collections.abc import Callable, Collection
from typing import cast

import torch
from torch import Tensor, nn


def compile_network(network: nn.Module, counts: Collection[int]) -> Callable[[Tensor], Tensor]:
    """Return the network through torch.compile, for batches of certain numbers of images.

    Each is compiled by itself, once for training and once for evaluation: kernels for any number
    are slower. Batches of other numbers, such as an epoch's last, take the network as it is.

    Args:
        network: maps (N, C, H, W) to logits; C, H and W are always the same.
        counts: each N to compile for.
    """
    compiled = cast("nn.Module", torch.compile(network, dynamic=False))

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = (compiled if len(images) in counts else network)(images)
        return logits

    return forward
