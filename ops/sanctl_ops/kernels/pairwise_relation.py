"""Launches of pairwise_logits.cu and pairwise_relation_gradient.cu."""

import torch
from torch import Tensor

from sanctl_ops.kernels import pairwise_narrow
from sanctl_ops.kernels.geometry import WARP, divisor_argument
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_saved import Packed, Saved
from sanctl_ops.kernels.pairwise_tiles import GRADIENT_PARTS, gradient_walk, relation_walk
from sanctl_ops.kernels.pairwise_weights import Closing
from sanctl_ops.kernels.runtime import kernel, launch

LOGITS = "pairwise_logits.cu"
RELATION_GRADIENT = "pairwise_relation_gradient.cu"
# Threads of a block of pairwise_fold_keys.
THREADS = 256


def weigh(folded: Tensor, affine: Tensor, packed: Packed, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the logits and the logarithms of the sums of their powers."""
    if pairwise_narrow.takes_relation(layout):
        return pairwise_narrow.weigh(folded, affine, packed, layout)
    cut, device = relation_walk(layout), folded.device
    logits = torch.empty(layout.logits_shape, dtype=torch.float16, device=device)
    sums = torch.empty(layout.sums_shape, device=device)
    launch(
        kernel(LOGITS, "pairwise_logits", layout.rel, layout.kernel_size),
        device,
        layout.images * cut.of_image,
        cut.warps * WARP,
        (
            *(folded[0], folded[1], affine, packed.first, packed.second),
            *(logits, sums, cut.argument, layout.slots),
        ),
        cut.shared_bytes,
    )
    return logits, sums


def relation_sums(
    saved: Saved, grad_logits: Tensor, closing: Closing, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return the gradient behind norm1 summed over queries' taps and, negative, keys' readers.

    Both are (N, H * W, rel + 8), laid out as the folded planes.
    """
    device, cut, size = grad_logits.device, gradient_walk(layout), layout.size
    weights = (saved.packed.first, saved.packed.back, closing.back)
    tiles, keys = layout.images * cut.of_image, (cut.rows + layout.kernel_size - 1) * cut.staged
    of_queries, of_keys = (
        torch.empty(layout.images, layout.plane, size, device=device) for _ in "qk"
    )
    of_tiles = torch.empty(tiles, keys, size, device=device)
    launch(
        kernel(RELATION_GRADIENT, "pairwise_relation_gradient", layout.rel, layout.kernel_size),
        device,
        tiles * GRADIENT_PARTS.get(layout.rel, 1),
        cut.warps * WARP,
        (
            *(saved.folded[0], saved.folded[1], saved.affine, *weights, grad_logits),
            *(closing.unscale, of_queries, of_tiles, cut.argument, layout.slots),
        ),
        cut.shared_bytes,
    )
    launch(
        kernel(RELATION_GRADIENT, "pairwise_fold_keys", layout.kernel_size),
        device,
        -(-of_keys.numel() // (8 * THREADS)),
        THREADS,
        (
            *(of_tiles, of_keys, cut.argument, divisor_argument(size // 8)),
            *(divisor_argument(layout.width), divisor_argument(layout.height), layout.images),
        ),
    )
    return of_queries, of_keys
