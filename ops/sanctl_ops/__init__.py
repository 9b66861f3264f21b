"""Operators of local self-attention over K x K windows, for CPU and CUDA tensors.

`subtraction`, `subtraction2`, `concatenation` and `aggregation` make up the self-attention networks
of Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition" (CVPR 2020), and
`batch_norm_relu` serves their blocks and the layers that make their weights. `pairwise_attention`
and `patchwise_attention` are what they make up, each in one operator; `conv_norm_pool` and
`norm_pool` what stands before the first stage of these networks and between any two. They are
custom operators (`torch.ops.sanctl`): torch.compile passes through them, forward and backward,
without a graph break. torch's FLOP counter knows them, and counts no batch normalisation.
"""

from sanctl_ops.aggregation import aggregation
from sanctl_ops.attention import Attention, Norm
from sanctl_ops.backend import (
    BackendError,
    Choice,
    choose_backend,
    requested_backend,
    set_backend,
    use_backend,
)
from sanctl_ops.batch_norm_relu import (
    batch_norm_relu,
    batch_norm_relu_obstacle,
    batch_norm_relu_with_skip,
)
from sanctl_ops.concatenation import concatenation
from sanctl_ops.conv_norm_pool import conv_norm_pool, conv_norm_pool_obstacle
from sanctl_ops.norm_pool import norm_pool, norm_pool_obstacle
from sanctl_ops.pairwise_attention import pairwise_attention, pairwise_attention_obstacle
from sanctl_ops.patchwise_attention import patchwise_attention, patchwise_attention_obstacle
from sanctl_ops.subtraction import subtraction
from sanctl_ops.subtraction2 import subtraction2

__all__ = [
    "Attention",
    "BackendError",
    "Choice",
    "Norm",
    "aggregation",
    "batch_norm_relu",
    "batch_norm_relu_obstacle",
    "batch_norm_relu_with_skip",
    "choose_backend",
    "concatenation",
    "conv_norm_pool",
    "conv_norm_pool_obstacle",
    "norm_pool",
    "norm_pool_obstacle",
    "pairwise_attention",
    "pairwise_attention_obstacle",
    "patchwise_attention",
    "patchwise_attention_obstacle",
    "requested_backend",
    "set_backend",
    "subtraction",
    "subtraction2",
    "use_backend",
]
