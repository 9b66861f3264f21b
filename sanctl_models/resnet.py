"""ResNet with bottleneck blocks, in torchvision's parameter names."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, conv1x1

from sanctl_models.checks import check_integers, check_stages
from sanctl_models.init import init_weights
from sanctl_models.network import Network

WIDTHS = (256, 512, 1024, 2048)
STEM_PLANES = 64
WIDTH_DIVISOR = Bottleneck.expansion


class ResNet(Network):
    """Residual network of bottleneck blocks (He et al., "Deep Residual Learning", CVPR 2016).

    As torchvision's, with the stride in the 3 x 3 convolution. Layers 3,4,6,3 make ResNet50.

    Args:
        layers: bottlenecks of each of the four stages.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the mend.
    """

    def __init__(self, layers: Sequence[int], num_classes: int = 1000, in_chans: int = 3) -> None:
        check_integers("layers", layers)
        check_stages(len(WIDTHS), "layers", layers)
        super().__init__(in_chans, min_input_size=1)
        self.conv1 = nn.Conv2d(in_chans, STEM_PLANES, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_PLANES)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        depth1, depth2, depth3, depth4 = layers
        self.layer1 = _stage(STEM_PLANES, WIDTHS[0], depth1, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], depth2, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], depth3, stride=2)
        self.layer4 = _stage(WIDTHS[2], WIDTHS[3], depth4, stride=2)
        self.fc = nn.Linear(WIDTHS[3], num_classes)
        init_weights(self)

    def feature_maps(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to (N, 2048, H', W'), H' about H / 32."""
        # Pooling first gives the same values and gradients, and rectifies a quarter of the pixels.
        x = self.relu(self.maxpool(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def residual_block(in_planes: int, planes: int, stride: int = 1) -> nn.Module:
    """Return torchvision's bottleneck, (N, in_planes, H, W) -> (N, planes, ceil(H / stride), ...).

    The shortcut is a 1 x 1 convolution and batch norm where the shape changes.
    """
    shortcut = None
    if stride != 1 or in_planes != planes:
        shortcut = nn.Sequential(conv1x1(in_planes, planes, stride), nn.BatchNorm2d(planes))
    block: nn.Module = Bottleneck(in_planes, planes // Bottleneck.expansion, stride, shortcut)
    return block


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = residual_block(in_planes, planes, stride)
    return nn.Sequential(first, *(residual_block(planes, planes) for _ in range(blocks - 1)))
