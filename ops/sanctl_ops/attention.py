"""What the fused attention operators take and return beside images."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A batch normalisation of C channels.

    Attributes:
        weight: (C,), the scale.
        bias: (C,), the shift.
        mean: (C,), running means to normalise by; None: the batch's own, as in training.
        variance: (C,), running variances; None where mean is.
        eps: what is added to the variance.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    variance: Tensor | None
    eps: float


class Attention(NamedTuple):
    """The result of a fused attention operator.

    Attributes:
        out: (N, C, H, W), channels_last if the values are, else contiguous.
        mean1: what the first normalisation took for means, in float64 if the values are, else in
            float32.
        variance1: the variances beside them; the batch's own are biased.
        mean2: the same of the second normalisation.
        variance2: the same of the second normalisation.
    """

    out: Tensor
    mean1: Tensor
    variance1: Tensor
    mean2: Tensor
    variance2: Tensor
