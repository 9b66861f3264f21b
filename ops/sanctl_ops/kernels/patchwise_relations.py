"""Launches of the CUDA kernels that go back through the relation of patchwise attention."""

import torch
from torch import Tensor

from sanctl_ops.kernels import patchwise_narrow as narrow
from sanctl_ops.kernels import patchwise_plan as plan
from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.patchwise import template, warps_together
from sanctl_ops.kernels.patchwise_fold import floats, join
from sanctl_ops.kernels.patchwise_plan import Sizes
from sanctl_ops.kernels.runtime import kernel, launch

# Blocks of 7 warps of patchwise_weight_gradient that a multiprocessor holds, by hidden tiles.
RESIDENT = {1: 4, 2: 4, 4: 3, 8: 2}


def first_sums(
    sizes: Sizes, query: Tensor, key: Tensor, units: Tensor, affine: Tensor, gradient: Tensor
) -> Tensor:
    """Return what `close_first` takes: sums over pixels, for the keys' taps and then the query."""
    if sizes.narrow:
        return narrow.first_sums(sizes, query, key, units, affine, gradient)
    tiles, parts = sizes.relation_tiles, sizes.hidden_tiles
    of_tap = tiles * 2 * parts * 128
    sums = torch.empty((sizes.taps + 1) * of_tap, dtype=torch.float64, device=key.device)
    tiling = plan.tiling(sizes, plan.bytes_of_weight_gradient)
    assert tiling is not None
    size, shape = sizes.kernel_size, plan.shape_argument(sizes, tiling, query=query, key=key)
    most = plan.multiprocessors(key.device) * RESIDENT[parts] * 7 // size
    for image, is_query, rows in ((key, False, size), (query, True, 1)):
        shares = plan.shares_of(sizes.images * tiling.down * tiling.across, most // (tiles * rows))
        out = sums[-of_tap:] if is_query else sums[:-of_tap]
        # A warp has a tap, or of the query a share of the pixels, of its own.
        joined = shares * size if is_query else shares
        partials = floats(key, joined * out.numel())
        launch(
            kernel(
                "patchwise_weight_gradient.cu",
                "patchwise_weight_gradient",
                *(key.dtype, *template(sizes), is_query),
            ),
            key.device,
            tiles * rows * shares,
            size * WARP,
            (image, units, affine, gradient, partials, shape, shares),
            plan.bytes_of_weight_gradient(sizes, tiling),
        )
        join(partials, joined, out)
    return sums


def image_gradients(
    sizes: Sizes,
    query: Tensor,
    key: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    gradient: tuple[Tensor, Tensor],
    taken: Tensor,
    by_batch: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and key, channels_last.

    Args:
        sizes: of the layer.
        query: as the kernels take it.
        key: the same.
        factors: the units, the relation's factors, and the first convolution's transpose.
        gradient: the hidden values', and its scales.
        taken: what the statistics take back.
        by_batch: whether they do.
    """
    if sizes.narrow:
        return narrow.image_gradients(sizes, query, key, (*factors, *gradient, taken), by_batch)
    tiling = plan.tiling(sizes, plan.bytes_of_relation_gradient)
    assert tiling is not None
    out_query, out = (plan.channels_last_like(x) for x in (query, key))
    parts = 2 * sizes.relation_tiles // sizes.relation_at_once
    launch(
        kernel(
            "patchwise_relation_gradient.cu",
            "patchwise_relation_gradient",
            *(key.dtype, *template(sizes)),
        ),
        key.device,
        sizes.images * tiling.down * tiling.across * parts,
        warps_together(sizes, tiling.products) * WARP,
        (
            query,
            key,
            *factors,
            *gradient,
            taken,
            out_query,
            out,
            plan.shape_argument(sizes, tiling, query=query, key=key),
            parts,
            int(by_batch),
        ),
        plan.bytes_of_relation_gradient(sizes, tiling),
    )
    return out_query, out
