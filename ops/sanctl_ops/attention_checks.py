"""Checks of the fused attention operators' arguments; every message carries the shapes."""

from torch import Tensor

from sanctl_ops.attention import Norm
from sanctl_ops.checks import (
    check_alike,
    check_device,
    check_dtype,
    check_image,
    check_window,
)
from sanctl_ops.window import Window


def check_images(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> None:
    """Raise ValueError unless the three images fit each other and the windows fit them."""
    for name, image in (("query", query), ("key", key), ("value", value)):
        check_image(name, image)
        check_alike("query", query, name, image)
    if query.shape != key.shape:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in shape")
    if (value.shape[0], *value.shape[2:]) != (query.shape[0], *query.shape[2:]):
        shapes = f"{tuple(query.shape)} and value {tuple(value.shape)}"
        raise ValueError(f"query {shapes} differ in images or pixels")
    if query.numel() == 0 or value.numel() == 0:
        raise ValueError(f"query {tuple(query.shape)} or value {tuple(value.shape)} is empty")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size} for {tuple(query.shape)}")
    check_window(Window(kernel_size, 1, kernel_size // 2, 1, "reflect"), query)


def check_pairwise_layers(
    query: Tensor,
    position: Tensor,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    bias2: Tensor,
    value: Tensor,
) -> None:
    """Raise ValueError unless position and parameters are for `query` and `value`."""
    _, relation, height, width = query.shape
    check_image("position", position)
    check_alike("query", query, "position", position)
    if position.shape != (1, 2, height, width):
        raise ValueError(
            f"position must be {(1, 2, height, width)} beside query {tuple(query.shape)}, "
            f"got {tuple(position.shape)}"
        )
    check_norm("norm1", norm1, relation + 2, value)
    check_norm("norm2", norm2, relation, value)
    _check_parameter("weight1", weight1, (relation, relation + 2), value)
    if weight2.dim() != 2 or weight2.shape[0] == 0 or value.shape[1] % weight2.shape[0] != 0:
        raise ValueError(
            f"weight2 must be (Cw, rel), Cw dividing the channels of value {tuple(value.shape)}, "
            f"got {tuple(weight2.shape)}"
        )
    _check_parameter("weight2", weight2, (weight2.shape[0], relation), value)
    _check_parameter("bias2", bias2, (weight2.shape[0],), value)


def check_patchwise_layers(
    relation: int,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    bias2: Tensor,
    value: Tensor,
    taps: int,
) -> None:
    """Raise ValueError unless the parameters are for `relation` channels, `value` and `taps`."""
    if weight1.dim() != 2 or weight1.shape[0] == 0:
        raise ValueError(f"weight1 must be (Cw, rel * (K*K + 1)), got {tuple(weight1.shape)}")
    width = weight1.shape[0]
    if value.shape[1] % width != 0:
        raise ValueError(
            f"the {width} channels of weight1 {tuple(weight1.shape)} do not divide "
            f"the channels of value {tuple(value.shape)}"
        )
    check_norm("norm1", norm1, relation, value)
    check_norm("norm2", norm2, width, value)
    _check_parameter("weight1", weight1, (width, relation), value)
    _check_parameter("weight2", weight2, (width * taps, width), value)
    _check_parameter("bias2", bias2, (width * taps,), value)


def check_norm(
    name: str, norm: Norm, channels: int, beside: Tensor, beside_name: str = "value"
) -> None:
    """Raise ValueError unless a normalisation is of so many channels, and on a tensor's device."""
    if (norm.mean is None) != (norm.variance is None):
        raise ValueError(f"{name} has a running mean or variance, but not both")
    for field, values in norm._asdict().items():
        if isinstance(values, Tensor):
            _check_parameter(f"{name}.{field}", values, (channels,), beside, beside_name)


def _check_parameter(
    name: str,
    values: Tensor,
    shape: tuple[int, ...],
    beside: Tensor,
    beside_name: str = "value",
) -> None:
    if values.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(values.shape)}")
    check_dtype(name, values)
    check_device(beside_name, beside, name, values)
