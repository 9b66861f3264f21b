"""What `bench-ops` measures: the operators, and the shapes that they meet in SAN10.

To add an operator, give it an entry in `OPERATORS`; bytes, checks and timings follow from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import sanctl_ops
from sanctl.bench import unfold


@dataclass(frozen=True)
class Shape:
    """A layer's self-attention at inputs of 224 px.

    Attributes:
        kernel_size: side K of the windows in pixels.
        relation, value, weight: channels of the query and the key, of the values, and of the
            weights.
        side: height and width of the planes in pixels.
    """

    kernel_size: int
    relation: int
    value: int
    weight: int
    side: int


class Draw(Protocol):
    """Draws a tensor of normally distributed elements."""

    def __call__(self, *size: int) -> Tensor:
        """Return a tensor of this size, of the dtype, layout and device that are measured."""


@dataclass(frozen=True)
class Operator:
    """An operator and everything that measuring it takes.

    Attributes:
        inputs: Draws the inputs for a shape and a batch of images.
        run: The operator; takes the kernel size and the inputs.
        unfold: The same function by torch alone.
        saved: Indices of the inputs that the formula of the gradient needs.
        couples_images: Whether an image's result depends on the others; where it does not, every
            input starts with the batch.
    """

    inputs: Callable[[Shape, int, Draw], list[Tensor]]
    run: Callable[..., Tensor]
    unfold: Callable[..., Tensor]
    saved: tuple[int, ...] = ()
    couples_images: bool = False


def _relation_inputs(count: int) -> Callable[[Shape, int, Draw], list[Tensor]]:
    def inputs(shape: Shape, batch: int, draw: Draw) -> list[Tensor]:
        return [draw(batch, shape.relation, shape.side, shape.side) for _ in range(count)]

    return inputs


def _aggregation_inputs(shape: Shape, batch: int, draw: Draw) -> list[Tensor]:
    return [
        draw(batch, shape.value, shape.side, shape.side),
        draw(batch, shape.weight, shape.kernel_size**2, shape.side**2),
    ]


def _batch_norm_inputs(shape: Shape, batch: int, draw: Draw) -> list[Tensor]:
    """Draw relations of every tap, and a weight and a bias of the dtype that sums are kept in.

    No result lies near ReLU's kink, where the gradient would hang on a rounding.
    """
    x = draw(batch, shape.relation, shape.kernel_size**2, shape.side**2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (draw(shape.relation).to(dtype).tanh() for _ in range(2))
    return [x.abs().add_(0.5).copysign_(x), 1.5 + scale / 2, shift / 5]


SHAPES = {
    "layer0": Shape(kernel_size=3, relation=4, value=16, weight=2, side=112),
    "layer1": Shape(kernel_size=7, relation=16, value=64, weight=8, side=56),
    "layer2": Shape(kernel_size=7, relation=32, value=128, weight=16, side=28),
    "layer3": Shape(kernel_size=7, relation=64, value=256, weight=32, side=14),
}
OPERATORS = {
    "subtraction": Operator(
        _relation_inputs(1),
        lambda k, x: sanctl_ops.subtraction(x, k, padding=k // 2),
        unfold.subtraction,
    ),
    "subtraction2": Operator(
        _relation_inputs(2),
        lambda k, x1, x2: sanctl_ops.subtraction2(x1, x2, k, padding=k // 2),
        unfold.subtraction2,
    ),
    "concatenation": Operator(
        _relation_inputs(2),
        lambda k, x1, x2: sanctl_ops.concatenation(x1, x2, k, padding=k // 2),
        unfold.concatenation,
    ),
    "aggregation": Operator(
        _aggregation_inputs,
        lambda k, x, w: sanctl_ops.aggregation(x, w, k, padding=k // 2),
        unfold.aggregation,
        saved=(0, 1),
    ),
    "batch_norm_relu": Operator(
        _batch_norm_inputs,
        lambda k, x, weight, bias: sanctl_ops.batch_norm_relu(x, weight, bias)[0],
        lambda k, x, weight, bias: unfold.batch_norm_relu(x, weight, bias),
        saved=(0, 1, 2),
        couples_images=True,
    ),
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
UNFOLD = "unfold"
"""The name of the baseline among the backends."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """An operator on inputs of one shape, dtype and layout.

    Attributes:
        op, shape, dtype, layout: Names in the tables above.
        batch: Images.
    """

    op: str
    shape: str
    dtype: str
    batch: int
    layout: str = "contiguous"

    @property
    def operator(self) -> Operator:
        """The operator's entry."""
        return OPERATORS[self.op]

    @property
    def kernel_size(self) -> int:
        """Side of the windows in pixels."""
        return SHAPES[self.shape].kernel_size

    def run(self, backend: str, inputs: list[Tensor]) -> Tensor:
        """Run the baseline where the backend is `unfold`, else the operator as it is set."""
        function = self.operator.unfold if backend == UNFOLD else self.operator.run
        return function(self.kernel_size, *inputs)

    def draw_inputs(self, device: torch.device) -> list[Tensor]:
        """Draw inputs that require gradients; planes lie in memory as the layout says."""
        shape = SHAPES[self.shape]

        def draw(*size: int) -> Tensor:
            x = torch.randn(size, dtype=DTYPES[self.dtype], device=device)
            planes = size[2:] == (shape.side, shape.side)
            return x.contiguous(memory_format=LAYOUTS[self.layout]) if planes else x

        return [x.requires_grad_() for x in self.operator.inputs(shape, self.batch, draw)]

    def __str__(self) -> str:
        """As it is named in an error."""
        return f"{self.op}, {self.shape}, {self.dtype}, batch {self.batch}"


@dataclass(frozen=True)
class InputSet:
    """What one call reads: the inputs, and the gradient of the output."""

    inputs: list[Tensor]
    grad: Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device) -> "InputSet":
        """Draw the inputs of a case, and a gradient in the shape of its output."""
        inputs = case.draw_inputs(device)
        with torch.no_grad():
            return cls(inputs, torch.randn_like(case.operator.run(case.kernel_size, *inputs)))

    def moved_bytes(self, direction: str, saved: tuple[int, ...]) -> int:
        """Return the bytes that a call must move: each input read once, each output written once.

        Forward reads the inputs and writes the output; backward reads the output's gradient and
        the saved inputs and writes a gradient for every input. (Batch normalisation has to finish
        sums over what it reads before it writes: where the cache does not keep that, it is read
        twice, and this floor is out of reach.)
        """
        inputs = sum(x.nbytes for x in self.inputs)
        read_again = sum(self.inputs[index].nbytes for index in saved)
        return inputs + self.grad.nbytes + (read_again if direction == "backward" else 0)
