"""SAN, the self-attention network: SAN10, SAN15 and SAN19 and any other depth and width."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_models.checks import (
    check_choice,
    check_integers,
    check_kernel,
    check_same_length,
    check_width,
)
from sanctl_models.init import init_weights
from sanctl_models.network import Network, before_max_pool
from sanctl_models.normalise import normalise_relu, normalise_relu_with_skip
from sanctl_models.pooling import convolve_normalise_pool, normalise_pool
from sanctl_models.sam import PAIRWISE, PATCHWISE, SAM

DEFAULT_WIDTHS = (64, 256, 512, 1024, 2048)
DEFAULT_KERNELS = (3, 7, 7, 7, 7)
STEM_PLANES = 64
# Relations are 1/16 and values 1/4 of the planes, and 8 values share a weight: 32 divides both.
WIDTH_DIVISOR = 32


class SANBottleneck(nn.Module):
    """Pre-activation residual bottleneck around self-attention (Zhao et al., CVPR 2020, sec. 4.1).

    Args:
        sa_type: 0 for pairwise, 1 for patchwise attention.
        planes: channels of input and output; a multiple of 32.
        kernel_size: side of the neighbourhood in pixels, odd.

    Raises:
        ValueError: planes is not a multiple of 32, or see `SAM`.
    """

    def __init__(self, sa_type: int, planes: int, kernel_size: int) -> None:
        super().__init__()
        check_width("planes", planes, WIDTH_DIVISOR, "self-attention")
        self.bn1 = nn.BatchNorm2d(planes)
        self.sam = SAM(sa_type, planes, planes // 16, planes // 4, 8, kernel_size)
        self.bn2 = nn.BatchNorm2d(planes // 4)
        self.conv = nn.Conv2d(planes // 4, planes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, planes, H, W) to the same shape."""
        out, skip = normalise_relu_with_skip(self.bn1, x)
        out = self.conv(normalise_relu(self.bn2, self.sam(out)))
        out += skip
        return out


class SAN(Network):
    """Self-attention network of Zhao et al., CVPR 2020 (table 1).

    Every stage halves the resolution by a 2 x 2 max-pool, changes the width by a 1 x 1 convolution
    and applies its bottlenecks.

    Args:
        sa_type: 0 for pairwise, 1 for patchwise attention.
        layers: bottlenecks of each stage.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        widths: channels of each stage, multiples of 32.
        kernels: neighbourhood of each stage in pixels, odd.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the mend.
    """

    def __init__(
        self,
        sa_type: int,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        widths: Sequence[int] = DEFAULT_WIDTHS,
        kernels: Sequence[int] = DEFAULT_KERNELS,
    ) -> None:
        _check_description(sa_type, layers, widths, kernels)
        super().__init__(in_chans, _smallest_side(kernels))
        self.conv_in = nn.Conv2d(in_chans, STEM_PLANES, 1, bias=False)
        self.bn_in = nn.BatchNorm2d(STEM_PLANES)
        planes = STEM_PLANES
        for s, (blocks, width, kernel) in enumerate(zip(layers, widths, kernels, strict=True)):
            bottlenecks = (SANBottleneck(sa_type, width, kernel) for _ in range(blocks))
            self.add_module(f"conv{s}", nn.Conv2d(planes, width, 1, bias=False))
            self.add_module(f"bn{s}", nn.BatchNorm2d(width))
            self.add_module(f"layer{s}", nn.Sequential(*bottlenecks))
            planes = width
        self.stages = len(layers)
        self.fc = nn.Linear(planes, num_classes)
        init_weights(self)

    def feature_maps(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to (N, widths[-1], H // 2**stages, W // 2**stages)."""
        x = convolve_normalise_pool(self.conv_in, self.bn_in, x)
        for s in range(self.stages):
            x = getattr(self, f"layer{s}")(getattr(self, f"conv{s}")(x))
            batch_norm, is_last = getattr(self, f"bn{s}"), s + 1 == self.stages
            x = F.relu(batch_norm(x), inplace=True) if is_last else normalise_pool(batch_norm, x)
        return x


def _check_description(
    sa_type: int, layers: Sequence[int], widths: Sequence[int], kernels: Sequence[int]
) -> None:
    """Raise ValueError, naming key, value and mend, unless these describe a SAN."""
    check_choice("sa_type", sa_type, (PAIRWISE, PATCHWISE))
    check_integers("layers", layers)
    check_integers("widths", widths)
    check_integers("kernels", kernels)
    check_same_length(layers=layers, widths=widths, kernels=kernels)
    for stage, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        check_width(f"widths[{stage}]", width, WIDTH_DIVISOR, "self-attention")
        check_kernel(f"kernels[{stage}]", kernel)


def _smallest_side(kernels: Sequence[int]) -> int:
    side = 1
    for kernel in reversed(kernels):
        side = before_max_pool(max(side, min_window_side(kernel)))
    return side


def min_window_side(kernel_size: int) -> int:
    """Return the smallest side in pixels that a self-attention window can mirror at its borders."""
    return kernel_size // 2 + 1
