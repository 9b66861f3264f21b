"""What the fused operators take and give besides plain tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """A batch normalisation of C channels.

    Attributes:
        weight: (C,), the scale.
        bias: (C,), the shift.
        mean: (C,), the running mean to normalise by; None for the batch's own, as in training.
        variance: (C,), the running variance to normalise by; None wherever mean is.
        eps: what is added to the variance.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    variance: Tensor | None
    eps: float

    def to(self, dtype: torch.dtype) -> "Norm":
        """Return the same with contiguous tensors of `dtype`."""
        mean, variance = (t if t is None else dense(t, dtype) for t in self[2:4])
        return Norm(dense(self.weight, dtype), dense(self.bias, dtype), mean, variance, self.eps)


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x contiguous and of `dtype`: itself if it is, which costs less to ask than to try."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


class Attention(NamedTuple):
    """The output of attention, and what its two normalisations went by.

    Attributes:
        out: (N, C, H, W), of the values' dtype, channels_last if the values are, else contiguous.
        mean1: mean of every channel before the first normalisation, in float32, or float64 for
            float64 inputs; as the other statistics it has no gradient.
        variance1: the biased variance there.
        mean2: the mean before the second normalisation.
        variance2: the biased variance there.
    """

    out: Tensor
    mean1: Tensor
    variance1: Tensor
    mean2: Tensor
    variance2: Tensor
