"""The self-attention module of SAN: weights from a K x K neighbourhood, applied to its values."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_models.autocast import convolved_dtype
from sanctl_models.checks import check_choice, check_kernel, check_width
from sanctl_models.fusion import requested_attention
from sanctl_models.normalise import (
    is_affine,
    norm_argument,
    normalise_relu,
    update_running_statistics,
)
from sanctl_ops import (
    aggregation,
    concatenation,
    pairwise_attention,
    pairwise_attention_obstacle,
    patchwise_attention,
    patchwise_attention_obstacle,
    subtraction2,
)

PAIRWISE, PATCHWISE = 0, 1


class SAM(nn.Module):
    """Pairwise or patchwise self-attention over the K x K neighbourhood of every pixel.

    Follows Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition" (CVPR 2020),
    with the subtraction relation for pairwise attention (sections 3.1 and 4.1) and the
    concatenation relation for patchwise attention (section 3.2). Borders are mirrored.

    Args:
        sa_type: 0 for pairwise, 1 for patchwise attention.
        in_planes: channels of the input.
        rel_planes: channels of query and key, from which the weights are made.
        out_planes: channels of the values and of the output.
        share_planes: channels of the values that share one weight; divides out_planes.
        kernel_size: side K of the neighbourhood in pixels, odd.

    Raises:
        ValueError: sa_type is unknown, share_planes does not divide out_planes, or kernel_size is
            even or below 1.
    """

    def __init__(
        self,
        sa_type: int,
        in_planes: int,
        rel_planes: int,
        out_planes: int,
        share_planes: int,
        kernel_size: int,
    ) -> None:
        super().__init__()
        check_choice("sa_type", sa_type, (PAIRWISE, PATCHWISE))
        check_kernel("kernel_size", kernel_size)
        check_width("out_planes", out_planes, share_planes, "sharing of weights")
        self.sa_type = sa_type
        self.kernel_size = kernel_size
        self.padding = kernel_size // 2
        self.conv1 = nn.Conv2d(in_planes, rel_planes, 1)
        self.conv2 = nn.Conv2d(in_planes, rel_planes, 1)
        self.conv3 = nn.Conv2d(in_planes, out_planes, 1)
        weight_planes = out_planes // share_planes
        taps = kernel_size * kernel_size
        if sa_type == PAIRWISE:
            self.conv_w = WeightLayers(rel_planes + 2, rel_planes, weight_planes)
            self.conv_p = nn.Conv2d(2, 2, 1)
        else:
            self.conv_w = WeightLayers(rel_planes * (taps + 1), weight_planes, taps * weight_planes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_planes, H, W) for x (N, in_planes, H, W); H and W exceed K // 2."""
        if self._is_fused(x):
            return self._fused(x)
        query, key, value = self.conv1(x), self.conv2(x), self.conv3(x)
        if self.sa_type == PAIRWISE:
            weights = self._pairwise_weights(query, key)
        else:
            weights = self._patchwise_weights(query, key)
        # Autocast computes softmax in float32, and the operator takes one dtype.
        weights = weights.to(value.dtype)
        return aggregation(value, weights, self.kernel_size, padding=self.padding)

    def fusing_obstacle(self, x: Tensor) -> str | None:
        """Say why all of attention is not one operator's kernels in mode "auto"; None if it is.

        Args:
            x: what `forward` would get, (N, in_planes, H, W), under autocast or not.
        """
        obstacle = self.conv_w.fusing_obstacle()
        if obstacle is not None:
            return obstacle
        query, value = (_projected(x, conv) for conv in (self.conv1, self.conv3))
        _, conv1, _, conv2 = self.conv_w.layers
        if self.sa_type == PAIRWISE:
            shared = conv2.out_channels
            return pairwise_attention_obstacle(query, value, shared, self.kernel_size)
        return patchwise_attention_obstacle(query, value, conv1.out_channels, self.kernel_size)

    def _is_fused(self, x: Tensor) -> bool:
        mode = requested_attention()
        if mode == "auto":
            return x.is_cuda and self.fusing_obstacle(x) is None
        obstacle = self.conv_w.fusing_obstacle()
        if mode == "fused" and obstacle is not None:
            raise ValueError(f"attention cannot be fused: {obstacle}")
        return mode == "fused"

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value; plain convolutions work as one, which reads x once."""
        convs = self.conv1, self.conv2, self.conv3
        if any(type(conv) is not nn.Conv2d or conv.bias is None for conv in convs):
            query, key, value = (conv(x) for conv in convs)
            return query, key, value
        weight, bias = (torch.cat([getattr(c, name) for c in convs]) for name in ("weight", "bias"))
        query, key, value = F.conv2d(x, weight, bias).split([c.out_channels for c in convs], 1)
        return query, key, value

    def _fused(self, x: Tensor) -> Tensor:
        """Return what `forward` does by one convolution and one operator."""
        query, key, value = self._project(x)
        norm1, conv1, norm2, conv2 = self.conv_w.layers
        first, second = norm_argument(norm1), norm_argument(norm2)
        weight1, weight2 = conv1.weight.flatten(1), conv2.weight.flatten(1)
        bias2, size = conv2.bias, self.kernel_size
        assert bias2 is not None
        count = query.numel() // query.shape[1]
        if self.sa_type == PAIRWISE:
            position = self.conv_p(position_map(query))
            attention = pairwise_attention(
                query, key, value, position, first, weight1, second, weight2, bias2, size
            )
            count *= size**2
        else:
            attention = patchwise_attention(
                query, key, value, first, weight1, second, weight2, bias2, size
            )
        update_running_statistics(norm1, attention.mean1, attention.variance1, count)
        update_running_statistics(norm2, attention.mean2, attention.variance2, count)
        return attention.out

    def _pairwise_weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Return softmax weights, (N, weight_planes, K*K, H*W)."""
        position = self.conv_p(position_map(query)).expand(query.shape[0], -1, -1, -1)
        # Joining planes is K*K times cheaper than joining the differences.
        relation = subtraction2(
            torch.cat((query, position), 1),
            torch.cat((key, position), 1),
            self.kernel_size,
            padding=self.padding,
        )
        return self.conv_w(relation).softmax(2)

    def _patchwise_weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Return weights straight from the whole patch, (N, weight_planes, K*K, H*W)."""
        relation = concatenation(query, key, self.kernel_size, padding=self.padding)
        taps = self.kernel_size * self.kernel_size
        weights: Tensor = self.conv_w(relation)
        return weights.view(query.shape[0], -1, taps, relation.shape[-1])


def _projected(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Stand in, for dtype and shape alone, for what a 1x1 convolution makes of x."""
    planes = x.new_empty((), dtype=convolved_dtype(x))
    return planes.expand(x.shape[0], conv.out_channels, *x.shape[2:])


def position_map(x: Tensor) -> Tensor:
    """Return the coordinates of x's pixels, (1, 2, H, W), in x's dtype and on its device.

    Channel 0 runs from -1 to 1 along the width, channel 1 along the height, both ends included.
    """
    height, width = x.shape[-2:]
    columns = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device)
    rows = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device)
    grid = (columns.expand(height, width), rows.unsqueeze(1).expand(height, width))
    return torch.stack(grid).unsqueeze(0)


class WeightLayers(nn.Sequential):
    """Makes weights from relations: twice batch normalisation, ReLU and a 1x1 convolution.

    Args:
        planes: channels of the relation.
        hidden: channels between the convolutions.
        out: channels of the weights.
    """

    def __init__(self, planes: int, hidden: int, out: int) -> None:
        super().__init__(
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, out, 1),
        )

    @property
    def layers(self) -> tuple[nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]:
        """The layers with parameters, in their order; other normalisations may stand in for two."""
        return cast("Any", (self[0], self[2], self[3], self[5]))

    def fusing_obstacle(self) -> str | None:
        """Say why the layers cannot be part of one operator; None if they can."""
        norm1, _, norm2, _ = self.layers
        for norm in (norm1, norm2):
            if type(norm) is not nn.BatchNorm2d or not is_affine(norm):
                return f"{type(norm).__name__} is not a BatchNorm2d with weight and bias"
        return None

    def forward(self, relation: Tensor) -> Tensor:
        """Return (N, out, ...) for a relation (N, planes, ...), 4-d."""
        hidden: Tensor = self[2](normalise_relu(self[0], relation))
        weights: Tensor = self[5](normalise_relu(self[3], hidden))
        return weights
