"""Networks whose stages are of different kinds: residual, self-attention or non-local."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sanctl_models import nonlocal_block, resnet, san
from sanctl_models.checks import (
    check_choice,
    check_integers,
    check_list,
    check_same_length,
    check_width,
)
from sanctl_models.init import init_weights
from sanctl_models.network import Network, before_max_pool, before_stride2
from sanctl_models.nl import nonlocal_stage
from sanctl_models.sam import PAIRWISE, PATCHWISE
from sanctl_models.transition import Transition

STAGE_TYPES = ("res", "san", "nl")
STEM_PLANES = 64


@dataclass(frozen=True)
class _Stage:
    index: int
    kind: str
    width: int
    blocks: int
    added_nl: int

    @property
    def window(self) -> int:
        """Side of the self-attention windows in pixels."""
        return 3 if self.index == 0 else 7

    @property
    def starts_with_transition(self) -> bool:
        """Whether a transition, not a strided residual block, changes width and resolution."""
        return self.kind != "res" or self.added_nl == self.blocks


class Hybrid(Network):
    """Stages of ResNet bottlenecks, self-attention and non-local blocks in any order.

    Every stage but a first one of type "res" halves the resolution. Self-attention windows are
    3 x 3 in the first stage and 7 x 7 in the others. See `ResNet`, `SAN` and `NonLocalNet` for
    the papers.

    Args:
        layers: main blocks of each stage.
        layer_types: "res" (ResNet bottlenecks), "san" (self-attention) or "nl" (non-local blocks)
            for each stage; the first is not "nl".
        widths: channels of each stage; multiples of 32 for "san", of 8 where there are non-local
            blocks, else of 4.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        sa_type: 0 for pairwise, 1 for patchwise attention; needed where there is a "san" stage.
        added_nl_blocks: non-local blocks between the main blocks of each stage, at most as many
            as these, 0 in an "nl" stage; by default 0 everywhere.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the mend.
    """

    def __init__(
        self,
        layers: Sequence[int],
        layer_types: Sequence[str],
        widths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        sa_type: int | None = None,
        added_nl_blocks: Sequence[int] | None = None,
    ) -> None:
        stages = _stages(layers, layer_types, widths, added_nl_blocks)
        if sa_type is None and "san" in layer_types:
            raise ValueError("sa_type: missing, but a stage of type 'san' needs it; use 0 or 1")
        if sa_type is not None:
            check_choice("sa_type", sa_type, (PAIRWISE, PATCHWISE))
        super().__init__(in_chans, _smallest_side(stages))
        self.stem = _stem(stages[0].kind, in_chans)
        modules: list[nn.Module] = []
        planes = STEM_PLANES
        for stage in stages:
            modules += _stage_layers(stage, planes, sa_type)
            planes = stage.width
        if stages[-1].kind != "res":
            modules += [nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]
        self.backbone = nn.Sequential(*modules)
        self.fc = nn.Linear(planes, num_classes)
        init_weights(self)

    def feature_maps(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to the last stage's (N, width, H', W')."""
        maps: Tensor = self.backbone(self.stem(x))
        return maps


def _stages(
    layers: Sequence[int],
    layer_types: Sequence[str],
    widths: Sequence[int],
    added_nl_blocks: Sequence[int] | None,
) -> list[_Stage]:
    check_integers("layers", layers)
    check_list("layer_types", layer_types, "stage types")
    check_integers("widths", widths)
    added = [0] * len(layers) if added_nl_blocks is None else added_nl_blocks
    check_integers("added_nl_blocks", added, smallest=0)
    check_same_length(layers=layers, layer_types=layer_types, widths=widths, added_nl_blocks=added)
    columns = zip(layer_types, widths, layers, added, strict=True)
    stages = [_Stage(index, *column) for index, column in enumerate(columns)]
    for stage in stages:
        _check_stage(stage)
    return stages


def _check_stage(stage: _Stage) -> None:
    index = stage.index
    check_choice(f"layer_types[{index}]", stage.kind, STAGE_TYPES)
    if index == 0 and stage.kind == "nl":
        raise ValueError("layer_types[0]: 'nl' has no stem of its own; use 'res' or 'san' first")
    most = 0 if stage.kind == "nl" else stage.blocks
    if stage.added_nl > most:
        raise ValueError(
            f"added_nl_blocks[{index}]: {stage.added_nl} is too many beside {stage.blocks} "
            f"blocks of type {stage.kind!r}; use {f'0 to {most}' if most else '0'}"
        )
    _check_width(stage)


def _check_width(stage: _Stage) -> None:
    divisors = {
        "res": resnet.WIDTH_DIVISOR,
        "san": san.WIDTH_DIVISOR,
        "nl": nonlocal_block.WIDTH_DIVISOR,
    }
    divisor, kind = divisors[stage.kind], f"a stage of type {stage.kind!r}"
    if stage.added_nl > 0:
        divisor = max(divisor, nonlocal_block.WIDTH_DIVISOR)
        kind += " with non-local blocks"
    check_width(f"widths[{stage.index}]", stage.width, divisor, kind)


def _stem(kind: str, in_chans: int) -> nn.Module:
    if kind == "san":
        return nn.Conv2d(in_chans, STEM_PLANES, 1, bias=False)
    return nn.Sequential(
        nn.Conv2d(in_chans, STEM_PLANES, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(STEM_PLANES),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.ReLU(inplace=True),
    )


def _stage_layers(stage: _Stage, in_planes: int, sa_type: int | None) -> list[nn.Module]:
    width = stage.width
    if stage.kind == "res":
        return [_residual_stage(stage, in_planes)]
    if stage.kind == "nl":
        return [Transition(in_planes, width), nonlocal_stage(width, stage.blocks)]
    assert sa_type is not None

    def attention_block() -> nn.Module:
        return san.SANBottleneck(sa_type, width, stage.window)

    blocks = _interleave(stage, attention_block, stage.blocks)
    return [Transition(in_planes, width), nn.Sequential(*blocks)]


def _residual_stage(stage: _Stage, in_planes: int) -> nn.Sequential:
    """Return a stage of residual blocks, the first of which changes width and resolution.

    Where a non-local block precedes every residual block, a transition does that instead.
    """
    width = stage.width

    def plain_block() -> nn.Module:
        return resnet.residual_block(width, width)

    if stage.starts_with_transition:
        first: nn.Module = Transition(in_planes, width)
        return nn.Sequential(first, *_interleave(stage, plain_block, stage.blocks))
    first = resnet.residual_block(in_planes, width, stride=1 if stage.index == 0 else 2)
    return nn.Sequential(first, *_interleave(stage, plain_block, stage.blocks - 1))


def _interleave(stage: _Stage, block: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    """Return `count` new main blocks with the stage's non-local blocks between them.

    Counted from the end, a non-local block stands before every second main block, or, where the
    stage has more non-local blocks than fit so, before every main block.
    """
    spacing = 2 if 2 * stage.added_nl <= stage.blocks else 1
    layers: list[nn.Module] = []
    for from_end in reversed(range(count)):
        if from_end % spacing == 0 and from_end // spacing < stage.added_nl:
            layers.append(nonlocal_block.NonLocalBlock(stage.width))
        layers.append(block())
    return layers


def _smallest_side(stages: Sequence[_Stage]) -> int:
    """Return the smallest image side, walking from the last stage's needs back to the image."""
    side = 1
    for stage in reversed(stages):
        if stage.kind == "san":
            side = max(side, san.min_window_side(stage.window))
        if stage.kind == "nl" or stage.added_nl > 0:
            side = max(side, nonlocal_block.MIN_SIDE)
        if stage.starts_with_transition:
            side = before_max_pool(side)
        elif stage.index > 0:
            side = before_stride2(side)
    if stages[0].kind == "res":
        side = before_stride2(before_stride2(side))
    return side
