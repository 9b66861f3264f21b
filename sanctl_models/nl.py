"""A network whose only spatial mixing after the stem is non-local."""

from collections.abc import Sequence

from torch import Tensor, nn

from sanctl_models.checks import check_integers, check_stages
from sanctl_models.init import init_weights
from sanctl_models.network import Network, before_max_pool, before_stride2
from sanctl_models.nonlocal_block import MIN_SIDE, NonLocalBlock
from sanctl_models.transition import Transition

WIDTHS = (256, 512, 1024, 2048)
STEM_PLANES = 64


class NonLocalNet(Network):
    """Four stages of pre-activated non-local blocks (Wang et al., CVPR 2018) with transitions.

    Args:
        layers: non-local blocks of each of the four stages.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        mode: pairwise function of the blocks, see `NonLocalBlock`.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the mend.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        mode: str = "dot",
    ) -> None:
        check_integers("layers", layers)
        check_stages(len(WIDTHS), "layers", layers)
        super().__init__(in_chans, _smallest_side())
        self.stem = nn.Conv2d(in_chans, STEM_PLANES, 7, stride=2, padding=3, bias=False)
        planes = STEM_PLANES
        for t, (blocks, width) in enumerate(zip(layers, WIDTHS, strict=True), start=1):
            self.add_module(f"transition{t}", Transition(planes, width))
            self.add_module(f"layer{t}", nonlocal_stage(width, blocks, mode))
            planes = width
        self.bn = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(planes, num_classes)
        init_weights(self)

    def feature_maps(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to (N, 2048, H', W'), H' = ceil(H / 2) // 16."""
        x = self.stem(x)
        for t in range(1, len(WIDTHS) + 1):
            x = getattr(self, f"layer{t}")(getattr(self, f"transition{t}")(x))
        return self.relu(self.bn(x))


def nonlocal_stage(planes: int, blocks: int, mode: str = "dot") -> nn.Sequential:
    """Return `blocks` times [batch norm, ReLU, non-local block], (N, planes, H, W) unchanged."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            NonLocalBlock(planes, mode),
        ]
    return nn.Sequential(*layers)


def _smallest_side() -> int:
    side = MIN_SIDE
    for _ in WIDTHS:
        side = before_max_pool(side)
    return before_stride2(side)
