"""The layer between two stages: it halves the resolution and changes the width."""

from torch import nn


class Transition(nn.Sequential):
    """Batch norm, ReLU, 2 x 2 max-pool and a 1 x 1 convolution without bias.

    Maps (N, in_planes, H, W) to (N, out_planes, H // 2, W // 2). The pool stands before the ReLU:
    both orders give the same values and gradients, and this one rectifies a quarter of the pixels.
    """

    def __init__(self, in_planes: int, out_planes: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_planes),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_planes, out_planes, 1, bias=False),
        )
