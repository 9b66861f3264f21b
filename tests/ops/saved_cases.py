"""Each operator once, with what its gradients flow to."""

from collections.abc import Callable

import pairwise_oracle
import pooling_cases
import torch
from op_cases import OPERATORS, Case, laid_out, make_inputs, moved
from pairwise_oracle import PairwiseCase
from patchwise_cases import Case as PatchwiseCase
from pooling_cases import PoolingCase
from torch import Tensor

from sanctl_ops import batch_norm_relu, batch_norm_relu_with_skip, patchwise_attention

DTYPE = torch.float32
# An output, and the leaves that gradients flow to.
Run = Callable[[str], tuple[Tensor, list[Tensor]]]


def windows(name: str) -> Run:
    def run(device: str) -> tuple[Tensor, list[Tensor]]:
        case = Case("windows", 6, 7, 3, padding=1)
        leaves = make_inputs(OPERATORS[name], case, device, DTYPE)
        return OPERATORS[name].run(*leaves, case.geometry), leaves

    return run


def normalised(layout: str) -> Run:
    def run(device: str) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        drawn = laid_out((2, 8, 5, 6), layout), torch.randn(8), torch.randn(8)
        x, weight, bias = (moved(t, device, DTYPE).requires_grad_() for t in drawn)
        return batch_norm_relu(x, weight, bias, 1e-5)[0], [x, weight, bias]

    return run


def with_skip(device: str) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    drawn = laid_out((2, 8, 5, 6), "channels_last"), torch.randn(8), torch.randn(8)
    x, weight, bias = (moved(t, device, DTYPE).requires_grad_() for t in drawn)
    out, skip, *_ = batch_norm_relu_with_skip(x, weight, bias)
    return out * skip, [x, weight, bias]


def pooled(image_channels: int | None) -> Run:
    def run(device: str) -> tuple[Tensor, list[Tensor]]:
        drawn = pooling_cases.draw(PoolingCase("pooled", 6, 7, 8, image_channels))
        inputs = drawn.to(device, DTYPE, DTYPE)
        return pooling_cases.fused(inputs)[0], inputs.leaves

    return run


PAIRWISE = PairwiseCase("pairwise", 16, 8, 6, 7, 3, layout="channels_last")


def pairwise(device: str) -> tuple[Tensor, list[Tensor]]:
    inputs = pairwise_oracle.draw(PAIRWISE).converted(device, DTYPE, DTYPE)
    return pairwise_oracle.fused(inputs).out, inputs.leaves


def patchwise(device: str) -> tuple[Tensor, list[Tensor]]:
    inputs = PatchwiseCase("patchwise", 6, 7, 3, relation=16, hidden=8).inputs()
    inputs = inputs.to(device, DTYPE, DTYPE)
    return patchwise_attention(*inputs.arguments).out, inputs.leaves


RUNS = {name: windows(name) for name in OPERATORS} | {
    "batch_norm_relu": normalised("contiguous"),
    "batch_norm_relu_channels_last": normalised("channels_last"),
    "batch_norm_relu_with_skip": with_skip,
    "norm_pool": pooled(None),
    "conv_norm_pool": pooled(3),
    "pairwise_attention": pairwise,
    "patchwise_attention": patchwise,
}
