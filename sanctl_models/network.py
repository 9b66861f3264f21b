"""What every network of this package has in common: pooled features, a classifier, input checks."""

import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """A feature extractor, global average pooling and a linear classifier `fc`.

    Subclasses implement `feature_maps` and set `fc` last, so that it comes last in the state_dict.

    Args:
        in_chans: channels of the input images, 3 for colour, 1 for grayscale.
        min_input_size: the smallest height and width in pixels that the layers can work on.
    """

    fc: nn.Linear

    def __init__(self, in_chans: int, min_input_size: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.min_input_size = min_input_size

    def feature_maps(self, x: Tensor) -> Tensor:
        """Return the last feature maps, (N, C, H', W'), for images (N, in_chans, H, W)."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the pooled features, (N, C), for images (N, in_chans, H, W).

        Raises:
            ValueError: the images have another number of channels than the network was built
                for, or fewer than `min_input_size` pixels on a side.
        """
        self._check_input(x)
        return F.adaptive_avg_pool2d(self.feature_maps(x), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, classes), for images (N, in_chans, H, W).

        Raises:
            ValueError: see `forward_features`.
        """
        return self.fc(self.forward_features(x))

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: this network takes "
                f"(N, {self.in_chans}, H, W); build it for the channels that the images have"
            )
        smallest = self.min_input_size
        if x.shape[2] < smallest or x.shape[3] < smallest:
            raise ValueError(
                f"input of {x.shape[2]} x {x.shape[3]} px is too small: this network needs at "
                f"least {smallest} x {smallest} px (what its halvings leave must hold its "
                "windows); use larger images, or a network with smaller kernels or fewer stages"
            )


def min_input_size(model: nn.Module) -> int:
    """Return the side in pixels of the smallest square image that `model` accepts.

    Raises:
        ValueError: `model` is not one of this package's networks.
    """
    if not isinstance(model, Network):
        raise ValueError(f"{type(model).__name__} is not a network of sanctl_models")
    return model.min_input_size


def before_max_pool(side: int) -> int:
    """Return the smallest side of which a 2 x 2 max-pool leaves `side` pixels."""
    return 2 * side


def before_stride2(side: int) -> int:
    """Return the smallest side of which a padded convolution or pool of stride 2 leaves `side`."""
    return 2 * side - 1
