"""What passes of pairwise attention hand on to others."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import strides_argument
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.runtime import Argument


@dataclass(frozen=True)
class Planes:
    """Query, key and position, whose layouts may be any."""

    query: Tensor
    key: Tensor
    position: Tensor

    @cached_property
    def countable(self) -> tuple[Tensor, ...]:
        """Return them such that 32 bits count the columns."""
        planes = (self.query, self.key, self.position)
        return tuple(x if x.stride(3) * x.shape[3] < 2**31 else x.contiguous() for x in planes)

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        """Return them with their strides."""
        return tuple(a for x in self.countable for a in (x, strides_argument(x)))


@dataclass(frozen=True)
class Packed:
    """Weights as the passes read them.

    Attributes:
        first: of the first convolution with the second normalisation, by hidden channels.
        second: of the second convolution, by weight channels, for logits to base 2.
        back: of the second convolution, by hidden channels.
    """

    first: Tensor
    second: Tensor
    back: Tensor


def empty_packed(like: Tensor, layout: Layout) -> Packed:
    """Return packed weights whose values are left open."""

    def packed(rows: int, columns: int) -> Tensor:
        return like.new_empty(rows * -(-columns // 32) * 32, dtype=torch.float16)

    first = packed(layout.hidden_rows, layout.size)
    second = packed(8 * layout.slabs, layout.hidden)
    return Packed(first, second, packed(layout.hidden_rows, 8 * layout.slabs))


@dataclass(frozen=True)
class Saved:
    """What the backward pass takes from the forward pass.

    Attributes:
        gram: the Gram matrix of z, as `pairwise_formulas.gram` returns it.
        folded: the folded planes of query and key, (2, N * H * W, rel + 8).
        affine: factors and summands of their last 8 channels.
        packed: the weights.
        logits: to base 2, (N, slabs * K*K, H * W * slots).
        log_sums: logarithms to base 2 of the sums of their powers, (N, slabs, H * W * slots).
        most_value: the largest value, disregarding signs, (1,).
    """

    gram: Tensor
    folded: Tensor
    affine: Tensor
    packed: Packed
    logits: Tensor
    log_sums: Tensor
    most_value: Tensor
