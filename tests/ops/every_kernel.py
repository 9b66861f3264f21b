"""Runs every instantiation of every kernel once on the GPU, for compute-sanitizer to look at:

    compute-sanitizer --tool memcheck  --error-exitcode 1 python tests/ops/every_kernel.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/ops/every_kernel.py

Run it once without the sanitizer before, which leaves the compiled kernels in CuPy's cache.
"""

import importlib
import itertools
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from kernel_instances import HIDDEN_TILES, TEMPLATES, instances
from pairwise_oracle import PairwiseCase, draw, fused
from patchwise_cases import Case, attended
from pooling_cases import PoolingCase
from pooling_cases import draw as draw_pooled
from pooling_cases import fused as pooled
from torch import Tensor

import sanctl_ops
from sanctl_ops import kernels
from sanctl_ops.checks import DTYPES
from sanctl_ops.kernels import (
    aggregation_mma,
    channels,
    conv_norm_pool,
    halves,
    pairwise_layout,
    runtime,
)
from sanctl_ops.kernels.geometry import SAME_KERNEL_SIZES

# Sides that every vector width and every way to share rows among warps serves.
SIDES = ((8, 8), (14, 14), (5, 4), (6, 28), (5, 6), (5, 7), (5, 56), (4, 24), (4, 22), (4, 60))
ELEMENTS = ((2, 3, 4, 6), (2, 3, 5, 7))
# Channels of the relation, of the weights, and values that share one: every number of weight
# channels in a slab with every number of blocks, then every width.
PAIRWISE = (
    *((4, slots, 8 * blocks // slots) for slots in pairwise_layout.SLOTS for blocks in (2, 4, 8)),
    *((relation, relation // 2, 2) for relation in pairwise_layout.RELATIONS[1:]),
)


def differentiate(run: Callable[..., Tensor], *shapes: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    out = run(*inputs)
    torch.autograd.grad(out, inputs, torch.randn_like(out))


def run_windows(
    dtype: torch.dtype, pad_mode: str, size: int, stride: int, height: int, width: int
) -> None:
    window: dict[str, Any] = {"stride": stride, "padding": size // 2, "pad_mode": pad_mode}
    rows, columns = ((side + 2 * (size // 2) - size) // stride + 1 for side in (height, width))

    def on_windows(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda a, b: operator(a, b, size, **window)

    planes, values = (2, 3, height, width), (2, 16, height, width)
    weights = (2, 2, size * size, rows * columns)
    differentiate(on_windows(sanctl_ops.subtraction2), planes, planes, dtype=dtype)
    differentiate(on_windows(sanctl_ops.concatenation), planes, planes, dtype=dtype)
    differentiate(on_windows(sanctl_ops.aggregation), values, weights, dtype=dtype)


def run_pairwise(
    dtype: torch.dtype, relation: int, weights: int, share: int, size: int, running: bool
) -> None:
    case = PairwiseCase("", relation, weights, 20, 12, size, share, 2, running, running)
    x = draw(case).converted("cuda", dtype, torch.float32)
    out = fused(x).out
    torch.autograd.grad(out, x.leaves, torch.randn_like(out))


def run_patchwise(dtype: torch.dtype, hidden: int, size: int) -> None:
    case = Case("", 16, 9, size, relation=2 * hidden, hidden=hidden)
    x = case.inputs().to("cuda", dtype, torch.float32)
    attended(x, torch.randn_like(x.value))


def run_pooling(dtype: torch.dtype, image_channels: int | None, running: bool) -> None:
    case = PoolingCase("", 37, 40, 24, image_channels, batch=3, running=running)
    x = draw_pooled(case).to("cuda", dtype, torch.float32)
    out, *_ = pooled(x)
    torch.autograd.grad(out, x.leaves, torch.randn_like(out))


def main() -> None:
    """Run all, and fail if a kernel that may be asked for was not launched."""
    sanctl_ops.set_backend("cupy")
    # Without it, kernels whose products are of halves take no float32 planes.
    torch.backends.cuda.matmul.allow_tf32 = True
    launched: set[runtime.Kernel] = set()

    def launch(kernel: runtime.Kernel, *arguments: Any) -> None:
        launched.add(kernel)
        runtime.launch(kernel, *arguments)

    for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(found.name)
        if module is not runtime and hasattr(module, "launch"):
            setattr(module, "launch", launch)  # noqa: B010
    tensor_cores = aggregation_mma.DTYPES
    for dtype, pad_mode, served in itertools.product(DTYPES, ("reflect", "zero"), (True, False)):
        setattr(aggregation_mma, "DTYPES", tensor_cores if served else ())  # noqa: B010
        run_windows(dtype, pad_mode, 3, 2, 6, 7)
        for size, (height, width) in itertools.product(SAME_KERNEL_SIZES, SIDES):
            run_windows(dtype, pad_mode, size, 1, height, width)
        for shape in ELEMENTS:
            channel = torch.ones(shape[1], device="cuda")
            differentiate(
                lambda x, one=channel: sanctl_ops.batch_norm_relu(x, one, one)[0],
                shape,
                dtype=dtype,
            )
        one = torch.ones(24, device="cuda")
        x = torch.randn(3, 37, 40, 24, device="cuda").to(dtype).movedim(-1, 1).requires_grad_()
        out, *_ = sanctl_ops.batch_norm_relu(x, one, one)
        torch.autograd.grad(out, x, torch.randn_like(out))
        out, skip, *_ = sanctl_ops.batch_norm_relu_with_skip(x, one, one)
        torch.autograd.grad(out + skip, x, torch.randn_like(out))
    torch.set_float32_matmul_precision("high")
    hidden_channels = (2, *(8 * tiles for tiles in HIDDEN_TILES))
    for dtype, size in itertools.product(halves.DTYPES, SAME_KERNEL_SIZES):
        for hidden in hidden_channels:
            run_patchwise(dtype, hidden, size)
        for layer, running in itertools.product(PAIRWISE, (False, True)):
            run_pairwise(dtype, *layer, size, running)
    image_channels = (None, *range(1, conv_norm_pool.MOST_IMAGE_CHANNELS + 1))
    for pooled_case in itertools.product(channels.DTYPES, image_channels, (False, True)):
        run_pooling(*pooled_case)
    torch.cuda.synchronize()
    missing = {kernel for source in TEMPLATES for kernel in instances(source)} - launched
    if missing:
        raise SystemExit(f"not launched: {sorted(map(str, missing))}")
    sys.stdout.write(f"{len(launched)} kernels ran\n")


if __name__ == "__main__":
    main()
