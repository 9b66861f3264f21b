"""The non-local block: attention over all positions of a feature map."""

import torch.nn.functional as F
from torch import Tensor, nn

from sanctl_models.checks import check_choice, check_width

MODES = ("dot", "embedded", "gaussian", "concatenate")
# theta and phi have 1/8 of the channels.
WIDTH_DIVISOR = 8
# Sub-sampling pools the keys and values 2 x 2.
MIN_SIDE = 2


class NonLocalBlock(nn.Module):
    """Residual attention over all positions (Wang et al., "Non-local Neural Networks", CVPR 2018).

    `z = W_z(y) + x` (equation 6), with y (equation 1) by one of the pairwise functions of section
    3.2. The batch norm in `W_z` starts at zero (section 4.1), so the block starts as the identity.

    Args:
        channels: channels of input and output, a multiple of 8; theta and phi have an eighth of
            them, g a quarter.
        mode: "dot", "embedded" (Gaussian), "gaussian" or "concatenate".
        sub_sample: pool keys and values by 2 x 2 (section 3.3).

    Raises:
        ValueError: mode is unknown, or channels is not a multiple of 8.
    """

    def __init__(self, channels: int, mode: str = "dot", sub_sample: bool = True) -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        check_width("channels", channels, WIDTH_DIVISOR, "a non-local block")
        self.mode = mode
        inner, values = channels // 8, channels // 4
        self.g = _maybe_pooled(nn.Conv2d(channels, values, 1), sub_sample)
        self.W_z = nn.Sequential(nn.Conv2d(values, channels, 1), nn.BatchNorm2d(channels))
        if mode == "gaussian":
            self.theta: nn.Module = nn.Identity()
            self.phi: nn.Module = nn.MaxPool2d(2) if sub_sample else nn.Identity()
        else:
            self.theta = nn.Conv2d(channels, inner, 1)
            self.phi = _maybe_pooled(nn.Conv2d(channels, inner, 1), sub_sample)
        if mode == "concatenate":
            self.W_f = nn.Sequential(nn.Conv2d(2 * inner, 1, 1), nn.ReLU())
        self.start_as_identity()

    def start_as_identity(self) -> None:
        """Set the last batch norm's scale and shift to zero, so that the block passes x on."""
        for parameter in self.W_z[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape; with sub-sampling, H and W are at least 2."""
        query, key, value = self.theta(x), self.phi(x), self.g(x).flatten(2)
        if self.mode == "dot":
            # (theta^T phi) g = theta^T (phi g): no (positions x positions) matrix is needed.
            context = value @ key.flatten(2).transpose(1, 2) / value.shape[-1]
            y = context @ query.flatten(2)
        elif self.mode == "concatenate":
            y = value @ self._concatenated(query, key).transpose(1, 2) / value.shape[-1]
        else:
            y = F.scaled_dot_product_attention(
                query.flatten(2).transpose(1, 2),
                key.flatten(2).transpose(1, 2),
                value.transpose(1, 2),
                scale=1.0,
            ).transpose(1, 2)
        return self.W_z(y.unflatten(2, x.shape[2:])) + x

    def _concatenated(self, query: Tensor, key: Tensor) -> Tensor:
        """Return `ReLU(w_f^T [theta, phi])` for all pairs, (N, positions, keys).

        w_f acts on theta and phi apart and the results are added, which needs no tensor of
        concatenated pairs.
        """
        weight, bias = self.W_f[0].parameters()
        of_query, of_key = weight.chunk(2, 1)
        queries = F.conv2d(query, of_query, bias).flatten(2).transpose(1, 2)
        return F.relu(queries + F.conv2d(key, of_key).flatten(2))


def _maybe_pooled(conv: nn.Conv2d, pooled: bool) -> nn.Module:
    return nn.Sequential(conv, nn.MaxPool2d(2)) if pooled else conv
