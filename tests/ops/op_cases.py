"""One table of cases for every operator on every device, and the inputs that a case stands for."""

from collections.abc import Callable
from dataclasses import dataclass

import op_oracle
import pytest
import torch
from op_oracle import Array, Geometry
from torch import Tensor

import sanctl_ops

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
LAYOUTS = ("contiguous", "channels_last", "some_channels_last", "transposed", "sliced")
# Of which results are channels_last.
CHANNELS_LAST = ("channels_last", "some_channels_last")


@dataclass(frozen=True)
class Case:
    """Shapes and geometry; `shared` is Cw, the number of weight channels of aggregation."""

    name: str
    height: int
    width: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    pad_mode: str = "reflect"
    batch: int = 2
    channels: int = 4
    shared: int = 2
    layout: str = "contiguous"

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.pad_mode)

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        size = op_oracle.output_size(self.height, self.width, self.geometry)
        return self.batch, self.channels, *size

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        rows, columns = self.output_shape[2:]
        return self.batch, self.shared, self.kernel_size**2, rows * columns


CASES = [
    Case("same_3x3", 6, 6, 3, padding=1),
    Case("same_3x3_zero", 6, 6, 3, padding=1, pad_mode="zero"),
    Case("odd_sides_5x5", 7, 5, 5, padding=2),
    Case("odd_sides_5x5_zero", 5, 9, 5, padding=2, pad_mode="zero"),
    Case("smallest_reflected_7x7", 4, 4, 7, padding=3),
    Case("zero_padding_beyond_the_side", 3, 2, 7, padding=3, pad_mode="zero"),
    Case("stride_2_odd_sides", 7, 9, 3, stride=2, padding=1),
    Case("stride_2_even_sides", 8, 6, 3, stride=2, padding=1, pad_mode="zero"),
    Case("stride_3_leaves_pixels_unread", 8, 8, 2, stride=3),
    Case("dilation_2", 8, 7, 3, padding=2, dilation=2),
    Case("dilation_2_zero", 5, 6, 3, padding=2, dilation=2, pad_mode="zero"),
    Case("stride_2_dilation_2", 9, 9, 5, stride=2, padding=4, dilation=2),
    Case("kernel_1", 5, 4, 1),
    Case("kernel_1_stride_2", 5, 6, 1, stride=2),
    Case("kernel_1_in_zeros", 3, 4, 1, padding=2, pad_mode="zero"),
    Case("kernel_2", 5, 6, 2, padding=1),
    Case("kernel_4_zero", 6, 5, 4, padding=2, pad_mode="zero"),
    Case("no_padding", 6, 7, 3),
    Case("less_padding_than_same", 6, 6, 5, padding=1),
    Case("more_padding_than_same", 5, 6, 3, padding=4),
    Case("more_padding_than_same_zero", 5, 6, 3, padding=3, pad_mode="zero"),
    Case("one_window", 3, 3, 5, padding=1),
    Case("weights_for_every_channel", 5, 5, 3, padding=1, shared=4),
    Case("one_weight_for_all_channels", 5, 5, 3, padding=1, batch=1, channels=3, shared=1),
    Case("one_channel", 6, 6, 3, padding=1, channels=1, shared=1),
    Case("no_images", 4, 4, 3, padding=1, batch=0),
    Case("channels_last", 6, 7, 3, padding=1, layout="channels_last"),
    Case("some_channels_last", 6, 7, 3, padding=1, layout="some_channels_last"),
    Case("channels_last_zero_stride_2", 7, 7, 3, 2, 1, pad_mode="zero", layout="channels_last"),
    Case("channels_last_no_padding", 6, 7, 3, layout="channels_last"),
    Case("transposed", 6, 5, 3, padding=1, layout="transposed"),
    Case("sliced", 5, 6, 3, padding=1, layout="sliced"),
    Case("sliced_no_padding", 5, 6, 3, pad_mode="zero", layout="sliced"),
]


@dataclass(frozen=True)
class Operator:
    """An operator beside the loops that define it.

    `run` and `expected` take the inputs and the geometry, `gradients` also the gradient of the
    output, which it is given between the two.
    """

    run: Callable[..., Tensor]
    input_shapes: Callable[[Case], list[tuple[int, ...]]]
    expected: Callable[..., Array]
    gradients: Callable[..., tuple[Array, ...]]


def _subtraction_gradients(x: Array, grad: Array, geometry: Geometry) -> tuple[Array]:
    grad1, grad2 = op_oracle.subtraction2_gradients(x, x, grad, geometry)
    return (grad1 + grad2,)


OPERATORS = {
    "subtraction": Operator(
        lambda x, geometry: sanctl_ops.subtraction(x, *geometry),
        lambda case: [case.image_shape],
        lambda x, geometry: op_oracle.subtraction2(x, x, geometry),
        _subtraction_gradients,
    ),
    "subtraction2": Operator(
        lambda x1, x2, geometry: sanctl_ops.subtraction2(x1, x2, *geometry),
        lambda case: [case.image_shape, case.image_shape],
        op_oracle.subtraction2,
        op_oracle.subtraction2_gradients,
    ),
    "concatenation": Operator(
        lambda x1, x2, geometry: sanctl_ops.concatenation(x1, x2, *geometry),
        lambda case: [case.image_shape, case.image_shape],
        op_oracle.concatenation,
        op_oracle.concatenation_gradients,
    ),
    "aggregation": Operator(
        lambda x, w, geometry: sanctl_ops.aggregation(x, w, *geometry),
        lambda case: [case.image_shape, case.weight_shape],
        op_oracle.aggregation,
        op_oracle.aggregation_gradients,
    ),
}


def laid_out(shape: tuple[int, ...], layout: str) -> Tensor:
    """Draw a float64 CPU tensor whose elements lie in memory as `layout` says."""
    batch, channels, height, width = shape
    if layout == "channels_last":
        return torch.randn(batch, height, width, channels, dtype=torch.float64).movedim(-1, 1)
    if layout == "some_channels_last":
        wide = torch.randn(batch, height, width, 2 * channels + 3, dtype=torch.float64)
        return wide.movedim(-1, 1)[:, 3 : channels + 3]
    if layout == "transposed":
        return torch.randn(batch, channels, width, height, dtype=torch.float64).mT
    if layout == "sliced":
        wide = torch.randn(batch, channels + 1, height, 2 * width, dtype=torch.float64)
        return wide[:, 1:, :, ::2]
    return torch.randn(shape, dtype=torch.float64)


def last_dimension_outermost() -> torch.autograd.graph.saved_tensors_hooks:
    """Give backward passes what was saved in another layout, as torch.compile may do."""

    def stored_anew(x: Tensor) -> Tensor:
        return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.dim() > 0 else x

    return torch.autograd.graph.saved_tensors_hooks(stored_anew, lambda x: x)


def make_inputs(
    operator: Operator, case: Case, device: str, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Draw the inputs of a case, as leaves that require gradients."""
    torch.manual_seed(0)
    drawn = [laid_out(shape, case.layout) for shape in operator.input_shapes(case)]
    return [moved(x, device, dtype).requires_grad_() for x in drawn]


def moved(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """Copy a tensor with its strides and offset; `to` keeps the strides of dense tensors only."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    storage = torch.zeros(x.storage_offset() + max(extent, 0), dtype=dtype, device=device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def as_array(x: Tensor) -> Array:
    """Return a tensor's values, as they are after rounding to its dtype, in float64."""
    array: Array = x.detach().to("cpu", torch.float64).numpy()
    return array
