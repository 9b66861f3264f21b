"""From uint8 batches to normalised floats, on the device where they are needed."""

from collections.abc import Sequence

import torch
from torch import nn


class Normalizer(nn.Module):
    """Computes `(x / 255 - mean) / std` for each channel.

    Args:
        mean: One value, or one for each channel, in [0, 1].
        std: The same number of values, above 0.

    Raises:
        ValueError: The numbers of values differ, or a std is not above 0.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} values and std {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"every std must be above 0, not {list(std)}")
        centre = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
        spread = torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
        # Not persistent: checkpoints hold the network alone.
        self.register_buffer("scale", (1 / (255 * spread)).float(), persistent=False)
        self.register_buffer("shift", (-centre / spread).float(), persistent=False)
        self.scale: torch.Tensor
        self.shift: torch.Tensor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Take uint8 images (N, C, H, W) to float32 ones of the same shape."""
        return images * self.scale + self.shift
