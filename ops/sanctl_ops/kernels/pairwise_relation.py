"""Launches of pairwise_logits.cu and pairwise_relation_gradient.cu."""

import math

import torch
from torch import Tensor

from sanctl_ops.kernels.geometry import WARP
from sanctl_ops.kernels.pairwise_layout import Layout
from sanctl_ops.kernels.pairwise_saved import Packed, Saved
from sanctl_ops.kernels.pairwise_tiles import relation_walk
from sanctl_ops.kernels.pairwise_weights import Closing
from sanctl_ops.kernels.runtime import kernel, launch

LOGITS = "pairwise_logits.cu"
RELATION_GRADIENT = "pairwise_relation_gradient.cu"


def weigh(folded: Tensor, affine: Tensor, packed: Packed, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the logits and the logarithms of the sums of their powers."""
    cut, device = relation_walk(layout), folded.device
    logits = torch.empty(layout.logits_shape, dtype=torch.float16, device=device)
    sums = torch.empty(layout.images, layout.slabs, layout.plane, layout.slots, device=device)
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
    """Return the gradient behind norm1 summed over queries' taps and, negative, padded keys'."""
    device = grad_logits.device
    weights = (saved.packed.first, saved.packed.back, closing.back)
    found = []
    for keys in (False, True):
        cut = relation_walk(layout, keys)
        pixels = math.prod(layout.padded) if keys else layout.plane
        grad = torch.empty(layout.images, pixels, layout.size, device=device)
        parameters = (layout.rel, layout.kernel_size, keys)
        launch(
            kernel(RELATION_GRADIENT, "pairwise_relation_gradient", *parameters),
            device,
            layout.images * cut.of_image,
            cut.warps * WARP,
            (
                *(saved.folded[0], saved.folded[1], saved.affine, *weights, grad_logits),
                *(closing.unscale, grad, cut.argument, layout.slots),
            ),
            cut.shared_bytes,
        )
        found.append(grad)
    return found[0], found[1]
