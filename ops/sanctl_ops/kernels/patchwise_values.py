"""Launches of the CUDA kernels that go back through the values that patchwise attention weighs."""

import torch
from torch import Tensor

from sanctl_ops.kernels import patchwise_narrow as narrow
from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.patchwise import Parameters, template, warps_for, warps_together
from sanctl_ops.kernels.patchwise_fold import floats, fold_second, join
from sanctl_ops.kernels.patchwise_plan import Sizes
from sanctl_ops.kernels.runtime import kernel, launch


def slopes(
    sizes: Sizes, grad: Tensor, value: Tensor, rectified: Tensor, layer: Parameters
) -> tuple[Tensor, Tensor]:
    """Return the rectified values' gradients in parts, (WT, N * HW, Cw), and the weights' sums."""
    if sizes.narrow:
        second = (layer.weight2, layer.bias2)
        return narrow.slopes(sizes, grad, value, rectified, *second)
    turned, _ = fold_second(sizes, layer.weight2, layer.bias2, turned=True)
    tiling = plan.tiling(sizes, plan.bytes_of_slopes)
    assert tiling is not None
    parts = sizes.hidden_tiles
    shared_bytes = plan.bytes_of_slopes(sizes, tiling)
    warps = warps_together(sizes, tiling.paired.products)
    blocks = plan.shares_of(
        sizes.images * tiling.down * tiling.across,
        -(-plan.resident_blocks(grad.device, shared_bytes, warps) // parts),
    )
    gradients = floats(grad, parts * sizes.images * sizes.pixels * sizes.hidden)
    rows = 1 if parts == 1 else parts // 2 + 1
    sums = torch.empty(parts * sizes.taps * rows * 128, dtype=torch.float64, device=grad.device)
    partials = floats(grad, blocks * sums.numel())
    launch(
        kernel("patchwise_slopes.cu", "patchwise_slopes", grad.dtype, *template(sizes)),
        grad.device,
        blocks * parts,
        warps * WARP,
        (
            grad,
            value,
            rectified,
            turned,
            gradients,
            partials,
            plan.shape_argument(sizes, tiling, value=value, grad=grad),
            blocks,
        ),
        shared_bytes,
    )
    join(partials, blocks, sums)
    return gradients, sums


def value_gradient(sizes: Sizes, grad: Tensor, rectified: Tensor, layer: Parameters) -> Tensor:
    """Return the gradient of the values, channels_last."""
    if sizes.narrow:
        return narrow.value_gradient(sizes, grad, rectified, layer.weight2, layer.bias2)
    second, biases = fold_second(sizes, layer.weight2, layer.bias2)
    tiling = plan.tiling(sizes, plan.bytes_of_value_gradient)
    assert tiling is not None
    out = plan.channels_last_like(grad)
    parts = sizes.hidden_tiles
    shared_bytes = plan.bytes_of_value_gradient(sizes, tiling)
    warps = warps_for(tiling.paired.products)
    blocks = plan.shares_of(
        sizes.images * tiling.down * tiling.across,
        -(-plan.resident_blocks(grad.device, shared_bytes, warps) // parts),
    )
    # What positions beyond the image get, on its way to the pixels that they mirror.
    pitch = (tiling.halo - tiling.rows * tiling.columns) * plan.VALUES
    mirrors = rectified.new_empty(blocks * parts * pitch)
    launch(
        kernel(
            "patchwise_value_gradient.cu",
            "patchwise_value_gradient",
            *(grad.dtype, *template(sizes)),
        ),
        grad.device,
        blocks * parts,
        warps * WARP,
        (
            grad,
            rectified,
            second,
            biases,
            mirrors,
            out,
            plan.shape_argument(sizes, tiling, grad=grad),
            blocks,
            pitch,
        ),
        shared_bytes,
    )
    return out
