"""Mean and variance of every channel of a concatenated relation, without the relation."""

import torch
from torch import Tensor


def relation_statistics(query: Tensor, key: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Return what batch normalisation takes from `concatenation(query, key, K, padding=K // 2)`.

    A tap reads every pixel of a key's plane a fixed number of times, which is the product of a
    number for its row and one for its column. So sums over all windows follow from sums over
    images.

    Args:
        query: (N, rel, H, W).
        key: like query; H and W exceed K // 2.
        kernel_size: K, odd.

    Returns:
        The means and the biased variances, (rel * (K*K + 1),), in float64: nothing less keeps the
        variance of values that lie far from zero or hardly differ.
    """
    wide_query, wide_key = query.double(), key.double()
    variance, mean = torch.var_mean(wide_query, (0, 2, 3), correction=0)
    centre = wide_key.mean((0, 2, 3))
    centred = wide_key - centre[:, None, None]
    moments = torch.stack((centred.sum(0), centred.square().sum(0)))
    rows, columns = (multiplicities(side, kernel_size, key.device) for side in key.shape[2:])
    first, second = (rows @ moments @ columns.mT / (query.numel() // query.shape[1])).flatten(2)
    return (
        torch.cat((mean, (first + centre[:, None]).flatten())),
        torch.cat((variance, (second - first.square()).clamp_min(0).flatten())),
    )


def multiplicities(side: int, kernel_size: int, device: torch.device) -> Tensor:
    """Return how often each of the K taps of a row of windows reads a pixel, (K, side), float64.

    The windows have their centres on the `side` pixels, and what they read beyond is mirrored.
    """
    pixels = torch.arange(side, device=device)
    offsets = torch.arange(kernel_size, device=device)[:, None] - kernel_size // 2
    read = (side - 1 - (side - 1 - (pixels + offsets).abs()).abs())[:, :, None]
    return (read == pixels).sum(1, dtype=torch.float64)
