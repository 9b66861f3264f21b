"""Launches of aggregation.cu."""

from dataclasses import dataclass

from torch import Tensor

from sanctl_ops.kernels import aggregation_mma
from sanctl_ops.kernels.geometry import (
    reflects,
    rows_of_tile,
    same_kernel_size,
    strides_argument,
    threads_for,
    vector_width,
    window_argument,
)
from sanctl_ops.kernels.runtime import MOST_SHARED_BYTES, kernel, launch
from sanctl_ops.window import Window, accumulation_dtype

SOURCE = "aggregation.cu"
THREADS = 256
# As in aggregation.cu.
CHANNELS_AT_ONCE = 8


@dataclass(frozen=True)
class _Tiling:
    """How a kernel `*_same` deals out the work; sizes in elements."""

    kernel_size: int
    vector: int
    tiles: int
    rows: int
    threads: int


def forward(window: Window, x: Tensor, w: Tensor, out: Tensor) -> None:
    """Write the weighted sums, (N, C, Ho, Wo) in any layout."""
    if aggregation_mma.forward(window, x, w, out):
        return
    batch, channels, height, width = x.shape
    shared_by = channels // w.shape[1]
    geometry = window_argument(window, height, width)
    tiling = _tiling(window, w, x, out)
    if tiling and (staged := _staged_bytes(tiling, x, shared_by)):
        launch(
            kernel(
                SOURCE,
                "aggregation_same",
                x.dtype,
                reflects(window),
                tiling.kernel_size,
                tiling.vector,
            ),
            x.device,
            batch * w.shape[1] * tiling.tiles,
            tiling.threads,
            (
                x,
                strides_argument(x),
                w,
                out,
                strides_argument(out),
                geometry,
                w.shape[1],
                shared_by,
                tiling.tiles,
                tiling.rows,
            ),
            staged,
        )
        return
    threads = threads_for(w.shape[3], THREADS)
    chunks = -(-w.shape[3] // threads)
    launch(
        kernel(SOURCE, "aggregation", x.dtype, reflects(window)),
        x.device,
        batch * channels * chunks,
        threads,
        (
            x,
            strides_argument(x),
            w,
            strides_argument(w),
            out,
            strides_argument(out),
            geometry,
            channels,
            w.shape[1],
            chunks,
        ),
    )


def weight_gradient(window: Window, grad: Tensor, x: Tensor, grad_w: Tensor) -> None:
    """Write the gradient of the weights, contiguous (N, Cw, K*K, P)."""
    if aggregation_mma.weight_gradient(window, grad, x, grad_w):
        return
    batch, weight_channels, taps, windows = grad_w.shape
    shared_by = x.shape[1] // weight_channels
    geometry = window_argument(window, *x.shape[2:])
    tiling = _tiling(window, grad_w, x, grad)
    if tiling and (staged := _staged_bytes(tiling, x, shared_by)):
        launch(
            kernel(
                SOURCE,
                "aggregation_weight_gradient_same",
                x.dtype,
                reflects(window),
                tiling.kernel_size,
                tiling.vector,
            ),
            x.device,
            batch * weight_channels * tiling.tiles,
            tiling.threads,
            (
                grad,
                strides_argument(grad),
                x,
                strides_argument(x),
                grad_w,
                geometry,
                weight_channels,
                shared_by,
                tiling.tiles,
                tiling.rows,
            ),
            staged,
        )
        return
    threads = threads_for(windows, THREADS)
    chunks = -(-windows // threads)
    launch(
        kernel(SOURCE, "aggregation_weight_gradient", x.dtype, reflects(window)),
        x.device,
        batch * weight_channels * taps * chunks,
        threads,
        (
            grad,
            strides_argument(grad),
            x,
            strides_argument(x),
            grad_w,
            geometry,
            weight_channels,
            shared_by,
            chunks,
        ),
    )


def input_gradient(window: Window, grad: Tensor, w: Tensor, grad_x: Tensor) -> None:
    """Write the gradient of x, (N, C, H, W) in any layout."""
    if aggregation_mma.input_gradient(window, grad, w, grad_x):
        return
    batch, channels, height, width = grad_x.shape
    shared_by = channels // w.shape[1]
    geometry = window_argument(window, height, width)
    tiling = _tiling(window, w, grad, grad_x)
    if tiling:
        staged = CHANNELS_AT_ONCE * (tiling.rows + tiling.kernel_size - 1) * width
        joined = tiling.rows * (width + tiling.kernel_size - 1)
        launch(
            kernel(
                SOURCE,
                "aggregation_input_gradient_same",
                grad.dtype,
                reflects(window),
                tiling.kernel_size,
                tiling.vector,
            ),
            grad.device,
            batch * w.shape[1] * tiling.tiles,
            tiling.threads,
            (
                grad,
                strides_argument(grad),
                w,
                grad_x,
                strides_argument(grad_x),
                geometry,
                w.shape[1],
                shared_by,
                tiling.tiles,
                tiling.rows,
            ),
            (staged + joined) * accumulation_dtype(grad.dtype).itemsize,
        )
        return
    threads = threads_for(height * width, THREADS)
    chunks = -(-height * width // threads)
    launch(
        kernel(SOURCE, "aggregation_input_gradient", grad.dtype, reflects(window)),
        grad.device,
        batch * channels * chunks,
        threads,
        (
            grad,
            strides_argument(grad),
            w,
            strides_argument(w),
            grad_x,
            strides_argument(grad_x),
            geometry,
            channels,
            w.shape[1],
            chunks,
        ),
    )


def _tiling(window: Window, w: Tensor, *planes: Tensor) -> _Tiling | None:
    """Return how a kernel `*_same` takes these tensors, or None where it does not."""
    size = same_kernel_size(window)
    if not size or not w.is_contiguous():
        return None
    height, width = planes[0].shape[2:]
    vector = vector_width(width, w, *planes)
    vectors = width // vector
    if vectors > THREADS:
        return None
    rows = rows_of_tile(height, vectors, THREADS)
    return _Tiling(size, vector, -(-height // rows), rows, threads_for(rows * vectors, THREADS))


def _staged_bytes(tiling: _Tiling, x: Tensor, shared_by: int) -> int:
    """Return the shared memory that stages a tile of x; 0 if it takes more than there is."""
    read = tiling.vector + tiling.kernel_size - 1
    pitch = x.shape[3] - tiling.vector + -(-read // tiling.vector) * tiling.vector
    elements = shared_by * (tiling.rows + tiling.kernel_size - 1) * pitch
    staged = elements * accumulation_dtype(x.dtype).itemsize
    return staged if staged <= MOST_SHARED_BYTES else 0
