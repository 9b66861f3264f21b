"""Launches of aggregation.cu, and of aggregation_mma.cu for the 16-bit values that it takes."""

from dataclasses import dataclass

from torch import Tensor

from sanctl_ops.kernels import aggregation_mma
from sanctl_ops.kernels.geometry import (
    deal_argument,
    joined_pitch,
    reflects,
    rows_of_tile,
    same_kernel_size,
    staged_vector,
    strides_argument,
    threads_for,
    vector_width,
    window_argument,
)
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES, Argument, kernel, launch
from sanctl_ops.window import Window, accumulation_dtype

SOURCE = "aggregation.cu"
THREADS = 256

# As in staged_tile.cuh and aggregation.cu.
CHANNELS = 8
SAME_THREADS = 128
GRADIENT_THREADS = 64
STAGES = 2


def forward(window: Window, x: Tensor, w: Tensor, out: Tensor) -> None:
    """Write the weighted sums, (N, C, Ho, Wo) in any layout."""
    planes: tuple[Argument, ...] = (x, strides_argument(x), w)
    result = (out, strides_argument(out))
    if aggregation_mma.forward(window, x, w, out):
        return
    plan = _plan(window, SAME_THREADS, w, x, out, reads_windows=True)
    if plan and plan.launch("aggregation_same", (*planes, *result), plan.ring + plan.staged):
        return
    arguments = (*planes, strides_argument(w), *result)
    _launch_any("aggregation", window, x, w.shape[3], arguments, (x.shape[1], w.shape[1]))


def weight_gradient(window: Window, grad: Tensor, x: Tensor, grad_w: Tensor) -> None:
    """Write the gradient of the weights, contiguous (N, Cw, K*K, P)."""
    planes = (grad, strides_argument(grad), x, strides_argument(x), grad_w)
    if aggregation_mma.weight_gradient(window, grad, x, grad_w):
        return
    plan = _plan(window, SAME_THREADS, grad_w, x, grad, reads_windows=True)
    if plan and plan.launch("aggregation_weight_gradient_same", planes, plan.staged):
        return
    _, weight_channels, taps, windows = grad_w.shape
    counts = (weight_channels, x.shape[1] // weight_channels)
    blocks_each = weight_channels * taps
    _launch_any("aggregation_weight_gradient", window, x, windows, planes, counts, blocks_each)


def input_gradient(window: Window, grad: Tensor, w: Tensor, grad_x: Tensor) -> None:
    """Write the gradient of x, (N, C, H, W) in any layout."""
    planes: tuple[Argument, ...] = (grad, strides_argument(grad), w)
    result = (grad_x, strides_argument(grad_x))
    if aggregation_mma.input_gradient(window, grad, w, grad_x):
        return
    plan = _plan(window, GRADIENT_THREADS, w, grad, grad_x, reads_windows=False)
    shared = plan.ring + max(plan.staged, plan.joined) if plan else 0
    if plan and plan.launch("aggregation_input_gradient_same", (*planes, *result), shared):
        return
    arguments = (*planes, strides_argument(w), *result)
    counts = (grad_x.shape[1], w.shape[1])
    pixels = grad_x.shape[2] * grad_x.shape[3]
    _launch_any("aggregation_input_gradient", window, grad_x, pixels, arguments, counts)


def _launch_any(
    name: str,
    window: Window,
    x: Tensor,
    items: int,
    planes: tuple[Argument, ...],
    counts: tuple[int, int],
    parts: int | None = None,
) -> None:
    """Launch a kernel for any windows: a thread for each item of each part of an image."""
    threads = threads_for(items, THREADS)
    chunks = -(-items // threads)
    launch(
        kernel(SOURCE, name, x.dtype, reflects(window)),
        x.device,
        x.shape[0] * (x.shape[1] if parts is None else parts) * chunks,
        threads,
        (*planes, window_argument(window, *x.shape[2:]), *counts, chunks),
    )


@dataclass(frozen=True)
class _Line:
    """A line of staged pixels, as struct Line in aggregation.cu lays it out.

    Attributes:
        margin: elements before the first pixel.
        pitch: elements of the line.
    """

    margin: int
    pitch: int

    @classmethod
    def read_by(cls, kernel_size: int, width: int, vector: int) -> "_Line":
        """Return the line that threads read for windows of `vector` neighbouring pixels."""
        radius, taps = kernel_size // 2, vector + kernel_size - 1
        whole = -(-radius // vector) * vector
        free = -(-(taps + whole - radius) // vector) == -(-taps // vector)
        margin = whole if free else radius
        read = -(-(taps + margin - radius) // vector) * vector
        return cls(margin, width - vector + read)


@dataclass(frozen=True)
class _Plan:
    """How a kernel `*_same` deals out the work on planes like x, which it stages.

    Attributes:
        window: the windows.
        x: the planes.
        kernel_size: K.
        vector: neighbouring pixels that a thread owns.
        weight_channels: channels of the weights.
        group: channels that share a weight.
        rows: rows of a tile.
        line: a staged line.
    """

    window: Window
    x: Tensor
    kernel_size: int
    vector: int
    weight_channels: int
    group: int
    rows: int
    line: _Line

    @property
    def threads(self) -> int:
        """Threads of a block."""
        owners = self.rows * self.x.shape[3] // self.vector
        return threads_for(owners, owners)

    @property
    def ring(self) -> int:
        """Bytes of the weights on their way to the threads of a block."""
        return STAGES * self.kernel_size * self.threads * self.vector * self.x.itemsize

    @property
    def staged(self) -> int:
        """Bytes of the staged lines."""
        lines = CHANNELS * (self.rows + self.kernel_size - 1)
        return lines * self.line.pitch * self.x.itemsize

    @property
    def joined(self) -> int:
        """Bytes of the sums of padded rows of a tile."""
        pitch = joined_pitch(self.x.shape[3], self.kernel_size, self.vector)
        return CHANNELS * self.rows * pitch * accumulation_dtype(self.x.dtype).itemsize

    def launch(self, name: str, planes: tuple[Argument, ...], shared_bytes: int) -> bool:
        """Launch a kernel; return False if it takes more shared memory than there is."""
        if shared_bytes > MOST_SHARED_BYTES:
            return False
        batch, _, height, width = self.x.shape
        tiles = -(-height // self.rows)
        whole = self.line.margin % self.vector == 0
        staged = staged_vector(self.x, self.vector) if whole else 1
        deal = deal_argument(
            tiles,
            self.weight_channels,
            width // self.vector,
            self.line.pitch // staged,
            rows=self.rows,
            group=self.group,
            pitch=self.line.pitch,
            plane_pitch=(self.rows + self.kernel_size - 1) * self.line.pitch,
        )
        instance = (self.x.dtype, reflects(self.window), self.kernel_size, self.vector)
        launch(
            kernel(SOURCE, name, *instance),
            self.x.device,
            batch * self.weight_channels * tiles,
            self.threads,
            (*planes, window_argument(self.window, height, width), deal, staged),
            shared_bytes,
        )
        return True


def _plan(
    window: Window, most_threads: int, w: Tensor, x: Tensor, other: Tensor, reads_windows: bool
) -> _Plan | None:
    """Return how a kernel `*_same` takes these tensors, or None where it does not.

    Args:
        window: the windows.
        most_threads: threads of a block, at most.
        w: the weights or their gradient.
        x: what it stages.
        other: what it reads or writes beside these.
        reads_windows: whether it reads windows of x, or x alone.
    """
    size = same_kernel_size(window)
    group = x.shape[1] // w.shape[1]
    if not size or not w.is_contiguous() or group > CHANNELS:
        return None
    height, width = x.shape[2:]
    vector = vector_width(width, w, x, other)
    vectors = width // vector
    if vectors > most_threads:
        return None
    rows = rows_of_tile(height, vectors, most_threads)
    line = _Line.read_by(size, width, vector) if reads_windows else _Line(0, width)
    return _Plan(window, x, size, vector, w.shape[1], group, rows, line)
