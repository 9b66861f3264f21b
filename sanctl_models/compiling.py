"""Networks through torch.compile."""

from typing import cast

import torch
from torch import Tensor, nn


def compile_network(network: nn.Module) -> nn.Module:
    """Return the network through torch.compile, for batches of any number of images.

    It is compiled once for training and once for evaluation: an epoch's last batch, which may have
    fewer images, takes the same code. Only a batch of a single image gets code of its own.
    """
    compiled = cast("nn.Module", torch.compile(network))
    compiled.register_forward_pre_hook(_free_batch)
    return compiled


def _free_batch(network: nn.Module, inputs: tuple[Tensor]) -> None:
    torch._dynamo.maybe_mark_dynamic(inputs[0], 0)
