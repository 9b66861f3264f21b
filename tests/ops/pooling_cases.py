"""Cases of the operators that normalise and pool, and torch's own operators as the oracle."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICES, LAYOUTS, laid_out, moved
from torch import Tensor

from sanctl_ops import Norm, conv_norm_pool, norm_pool

EPS = 1e-5
each_operator = pytest.mark.parametrize("image_channels", [None, 3], ids=["norm", "conv"])
each_device = pytest.mark.parametrize("device", DEVICES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_mode = pytest.mark.parametrize("running", [False, True], ids=["training", "running"])


@dataclass(frozen=True)
class PoolingCase:
    """Shapes, and what the values are like.

    `channels` of the output come from `image_channels` by a convolution, or from as many by none
    where that is None. `offset` and `std` are those of the values; `running` statistics are given.
    """

    name: str
    height: int
    width: int
    channels: int = 8
    image_channels: int | None = None
    batch: int = 2
    offset: float = 0.3
    std: float = 2.0
    running: bool = False
    layout: str = "channels_last"


@dataclass(frozen=True)
class Inputs:
    """What an operator takes; `weight` is None for norm_pool."""

    x: Tensor
    weight: Tensor | None
    norm: Norm

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients flow to."""
        first = self.x if self.weight is None else self.weight
        return [first, self.norm.weight, self.norm.bias]

    def to(self, device: str, dtype: torch.dtype, parameters: torch.dtype) -> "Inputs":
        """Return copies on a device, in dtypes of their own, as leaves."""
        x = moved(self.x.detach(), device, dtype).requires_grad_(self.weight is None)
        weight = None if self.weight is None else _leaf(self.weight, device, parameters)
        scale, bias = (_leaf(t, device, parameters) for t in (self.norm.weight, self.norm.bias))
        mean, variance = (None if t is None else t.to(device, parameters) for t in self.norm[2:4])
        return Inputs(x, weight, Norm(scale, bias, mean, variance, self.norm.eps))


def _leaf(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return x.detach().to(device, dtype, copy=True).requires_grad_()


def draw(case: PoolingCase) -> Inputs:
    """Draw float64 inputs on the CPU; some of the scales are negative."""
    torch.manual_seed(0)
    convolves = case.image_channels is not None
    shape = (case.batch, case.image_channels or case.channels, case.height, case.width)
    x = laid_out(shape, case.layout).mul_(case.std).add_(case.offset)
    scale, bias, centre = torch.randn(3, case.channels, dtype=torch.float64).unbind()
    mean = centre if case.running else None
    variance = torch.rand_like(centre) + 0.5 if case.running else None
    weight = torch.randn(case.channels, shape[1], dtype=torch.float64) if convolves else None
    return Inputs(x, weight, Norm(scale, bias, mean, variance, EPS)).to("cpu", x.dtype, x.dtype)


def fused(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the operator's output, means and variances."""
    if inputs.weight is None:
        return norm_pool(inputs.x, inputs.norm)
    return conv_norm_pool(inputs.x, inputs.weight, inputs.norm)


def output(inputs: Inputs) -> Tensor:
    """Return the operator's output."""
    return fused(inputs)[0]


def composed(inputs: Inputs) -> Tensor:
    """Return the output by torch's own operators."""
    x, norm = inputs.x, inputs.norm
    if inputs.weight is not None:
        x = F.conv2d(x, inputs.weight[:, :, None, None])
    x = F.batch_norm(
        *(x, norm.mean, norm.variance, norm.weight, norm.bias),
        training=norm.mean is None,
        eps=norm.eps,
    )
    return F.relu(F.max_pool2d(x, 2))


def statistics(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of what is normalised."""
    x = inputs.x
    if inputs.weight is not None:
        x = F.conv2d(x, inputs.weight[:, :, None, None])
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, variance


def truth(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return what inputs stand for, in float64: a convolution's weight is rounded to `dtype`."""
    wide = inputs.to("cpu", torch.float64, torch.float64)
    if wide.weight is None:
        return wide
    rounded = wide.weight.detach().to(dtype).double().requires_grad_()
    return Inputs(wide.x, rounded, wide.norm)


def differentiated(
    run: Callable[[Inputs], Tensor], inputs: Inputs, grad: Tensor
) -> dict[str, Tensor]:
    """Return output and gradients of all leaves, by name."""
    out = run(inputs)
    gradients = torch.autograd.grad(out, inputs.leaves, grad.to(out))
    return {"out": out.detach()} | dict(zip(("first", "weight", "bias"), gradients, strict=True))


def decided(inputs: Inputs, margin: float) -> Tensor:
    """Return where neither ReLU nor pooling hangs on rounding, as 0 and 1; inputs are float64.

    Equal pixels of a window stay equal under rounding: only different ones must lie apart.
    """
    norm = inputs.norm
    x = inputs.x if inputs.weight is None else F.conv2d(inputs.x, inputs.weight[:, :, None, None])
    mean, variance = statistics(inputs)
    if norm.mean is not None and norm.variance is not None:
        mean, variance = norm.mean, norm.variance
    scale = norm.weight / (variance + norm.eps).sqrt()
    z = ((x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).detach()
    windows = z.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    below = windows.amax(4, keepdim=True) - windows
    near = ((below > 1e-12) & (below < margin)).any(4)
    return (~near & (windows.amax(4).abs() > margin)).double()


def assert_same_nans(
    inputs: Inputs, actual: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Hold NaN against torch's; where x or a row of the weight has one, more may be."""
    for name, wanted in expected.items():
        found, spoilt = actual[name].isnan().cpu(), wanted.isnan()
        allowed = spoilt
        if name == "first" and inputs.weight is None:
            allowed = spoilt | inputs.x.isnan().cpu()
        elif name == "first":
            allowed = spoilt.any(1, keepdim=True).expand_as(spoilt)
        assert (spoilt <= found).all(), name
        assert (found <= allowed).all(), name
