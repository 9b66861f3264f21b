"""The transforms of training and evaluation, on uint8 tensors, by torchvision."""

from typing import Protocol

import torch
from torchvision.transforms import v2


class Transform(Protocol):
    """A function of one image."""

    def __call__(self, image: torch.Tensor, /) -> torch.Tensor:
        """Take a uint8 image of shape (C, H, W) to one of shape (C, S, S)."""
        ...


def train_transform(image_size: int) -> Transform:
    """A random crop of 8 to 100 % of the area, resized to a square, and a random flip.

    Args:
        image_size: Side of the square in px.

    The draws come from torch's default generator on the CPU.
    """
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )


def eval_transform(resize: int, image_size: int) -> Transform:
    """Antialiased bilinear resizing by the short side, then the centre.

    Args:
        resize: Short side in px after resizing.
        image_size: Side of the square that is kept, in px; an image that is smaller is padded
            with zeros, as torchvision does.
    """
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(image_size)])
