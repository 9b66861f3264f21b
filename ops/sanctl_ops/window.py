"""Geometry of the sliding K x K windows that every operator shares: padding, taps, adjoint."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """K x K windows that slide over the padded planes of an (N, C, H, W) tensor.

    Taps are numbered row by row: tap j of a window lies `dilation * (j // K)` pixels below and
    `dilation * (j % K)` pixels right of its first tap. Windows are numbered row by row, too.

    Attributes:
        kernel_size: taps per side, K.
        stride: pixels between neighbouring windows.
        padding: pixels added on each of the four sides.
        dilation: pixels between neighbouring taps.
        pad_mode: "reflect" (the border pixel is not repeated) or "zero".
    """

    kernel_size: int
    stride: int
    padding: int
    dilation: int
    pad_mode: str

    @property
    def taps(self) -> int:
        """Number of taps of a window, K * K."""
        return self.kernel_size * self.kernel_size

    @property
    def span(self) -> int:
        """Side in pixels of the square that a window covers."""
        return self.dilation * (self.kernel_size - 1) + 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (Ho, Wo), the number of windows down and across planes of `height` x `width`."""
        reach = 2 * self.padding - self.span
        return (height + reach) // self.stride + 1, (width + reach) // self.stride + 1

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the sides of planes of `height` x `width` pixels after padding."""
        return height + 2 * self.padding, width + 2 * self.padding

    def pad(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) padded to (N, C, H + 2p, W + 2p), contiguous."""
        # Rows must lie in one piece, as they do in the weights and results that meet them.
        x = x.contiguous()
        if self.padding == 0:
            return x
        mode = "constant" if self.pad_mode == "zero" else "reflect"
        return F.pad(x, [self.padding] * 4, mode=mode)

    def fold(self, padded: Tensor) -> Tensor:
        """Apply the adjoint of `pad`: add what lies in the padding to the pixels it came from.

        Slices are flipped and added in a fixed order, since torch's own backward of reflection
        padding is not deterministic on CUDA.

        Args:
            padded: (N, C, H + 2p, W + 2p); overwritten.

        Returns:
            (N, C, H, W); a view of `padded`.
        """
        p = self.padding
        if p == 0:
            return padded
        if self.pad_mode == "reflect":
            for dim in (-2, -1):
                side = padded.shape[dim] - 2 * p
                before, after = padded.narrow(dim, 0, p), padded.narrow(dim, p + side, p)
                padded.narrow(dim, p + 1, p).add_(before.flip(dim))
                padded.narrow(dim, side - 1, p).add_(after.flip(dim))
        return padded[..., p:-p, p:-p]

    def views(self, padded: Tensor) -> Tensor:
        """Return what every tap reads as an overlapping view (..., K, K, Ho, Wo): nothing copied.

        The (..., Ho, Wo) view of a single tap overlaps nowhere, so it may be written to.
        """
        rows = padded.unfold(-2, self.span, self.stride)
        windows = rows.unfold(-2, self.span, self.stride)
        return windows[..., :: self.dilation, :: self.dilation].movedim((-2, -1), (-4, -3))

    def tap_views(self, padded: Tensor) -> Iterator[Tensor]:
        """Yield the (..., Ho, Wo) view of `padded` that each of the K*K taps reads, in order."""
        views = self.views(padded)
        for row in range(self.kernel_size):
            for column in range(self.kernel_size):
                yield views[..., row, column, :, :]

    def centre_view(self, padded: Tensor) -> Tensor:
        """Return the (..., Ho, Wo) view of the windows' centres, tap (K - 1) // 2 on each side."""
        centre = (self.kernel_size - 1) // 2
        return self.views(padded)[..., centre, centre, :, :]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of `dtype` values are kept: float64 or else float32."""
    return torch.promote_types(dtype, torch.float32)


def plane_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of results that stand beside x.

    It is channels_last where the channels of a pixel of x lie beside one another, be they all or
    some of what a convolution made.
    """
    if not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1:
        return torch.channels_last
    return torch.contiguous_format


def empty_planes(x: Tensor) -> Tensor:
    """Return a new tensor like x in the memory format of results that stand beside it."""
    return torch.empty_like(x, memory_format=plane_format(x))
