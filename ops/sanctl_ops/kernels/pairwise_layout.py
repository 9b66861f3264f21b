"""Shapes of pairwise attention, and what its kernels make of them (pairwise.cuh)."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import Tensor

# As in pairwise.cuh.
TAIL = 8
# Channels of the relation that there are kernels for, beside those within the tail.
RELATIONS = (0, 16, 32, 64, 128)
IN_TAIL = TAIL - 3
# Weight channels of which one lane's pair may repeat, and channels in one piece for a slab.
SLOTS = (2, 4, 8)
BLOCKS = (2, 4, 8)
KERNEL_SIZES = (3, 5, 7)


@dataclass(frozen=True)
class Layout:
    """Shapes of a layer, and what the kernels make of them.

    Attributes:
        images, height, width: of the planes.
        relation: channels of query and key.
        weights: weight channels, Cw.
        channels: channels of the values.
        kernel_size: K.
    """

    images: int
    height: int
    width: int
    relation: int
    weights: int
    channels: int
    kernel_size: int

    @cached_property
    def rel(self) -> int:
        """Channels of the relation before the tail, padded; 0 if all are within it."""
        if self.relation <= IN_TAIL:
            return 0
        return next(r for r in RELATIONS if r >= self.relation)

    @cached_property
    def size(self) -> int:
        """Channels of the folded planes."""
        return self.rel + TAIL

    @cached_property
    def hidden(self) -> int:
        """Channels between the convolutions, padded."""
        return max(self.rel, 8)

    @cached_property
    def hidden_rows(self) -> int:
        """Rows of weights by hidden channels, whole blocks of 16."""
        return max(self.hidden, 16)

    @cached_property
    def slabs(self) -> int:
        """Blocks of weight channels."""
        return max(1, self.rel // 16)

    @cached_property
    def slots(self) -> int:
        """Weight channels of a slab."""
        return min(self.weights, 8)

    @cached_property
    def blocks(self) -> int:
        """Blocks of 8 channels of values that share a slab."""
        return self.channels // (8 * self.slabs)

    @cached_property
    def step(self) -> int:
        """Channels between the blocks of a slab."""
        return self.weights if self.slots == 8 else 8

    @cached_property
    def plane(self) -> int:
        """Pixels of a plane."""
        return self.height * self.width

    @cached_property
    def padded(self) -> tuple[int, int]:
        """Sides of the padded planes."""
        more = self.kernel_size - 1
        return self.height + more, self.width + more

    @cached_property
    def taps(self) -> int:
        """Taps of a window."""
        return self.kernel_size**2

    @cached_property
    def terms(self) -> int:
        """Relations of a channel: what the statistics are taken over."""
        return self.images * self.plane * self.taps

    # What is saved has 3 dimensions: tensors of 4 are planes to torch.compile, whose channels it
    # may put last.
    @cached_property
    def folded_shape(self) -> tuple[int, int, int]:
        """Shape of the folded planes of query and key."""
        return 2, self.images * self.plane, self.size

    @cached_property
    def logits_shape(self) -> tuple[int, int, int]:
        """Shape of the stored logits."""
        return self.images, self.slabs * self.taps, self.plane * self.slots

    @cached_property
    def sums_shape(self) -> tuple[int, int, int]:
        """Shape of the logarithms of the sums of their powers."""
        return self.images, self.slabs, self.plane * self.slots

    @cached_property
    def of_one_image(self) -> "Layout":
        """The layout of a single image."""
        return replace(self, images=1)

    @cached_property
    def obstacle(self) -> str | None:
        """Why there are no kernels for these shapes, or None."""
        if self.kernel_size not in KERNEL_SIZES:
            return f"a kernel_size of {self.kernel_size} is none of 3, 5 and 7"
        if self.relation > RELATIONS[-1]:
            return f"{self.relation} channels of query and key are more than {RELATIONS[-1]}"
        if self.slots not in SLOTS or self.weights != self.slots * self.slabs:
            return f"{self.weights} weight channels do not go with {self.relation} of the relation"
        shared = self.channels // self.weights
        if self.channels % 8 != 0 or self.blocks not in BLOCKS:
            return f"{shared} channels that share a weight do not make 2, 4 or 8 blocks"
        if self._is_large():
            return "the planes are too large"
        return None

    def _is_large(self) -> bool:
        """Tell whether 32 bits count too little: elements of an image, or vectors of all."""
        relation, values = math.prod(self.padded) * self.size, self.plane * self.channels
        of_image = max(relation, values, math.prod(self.logits_shape[1:]))
        return of_image >= 2**31 or self.images * max(relation, values) >= 2**34


# The same object again, so that what follows from it is worked out once.
_layout = lru_cache(maxsize=256)(Layout)


def layout_of(query: Tensor, value: Tensor, weights: int, kernel_size: int) -> Layout:
    """Return the layout of a layer; where shapes are symbolic, all but the batch become fixed."""
    images, *sides = query.shape
    relation, height, width = map(int, sides)
    channels = int(value.shape[1])
    sizes = (height, width, relation, int(weights), channels, kernel_size)
    # A symbolic number cannot be looked up.
    return _layout(images, *sizes) if isinstance(images, int) else Layout(images, *sizes)
