"""Right before fast: every result is compared with float64 before anything is timed."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sanctl.bench.cases import UNFOLD, Case, InputSet
from sanctl.errors import SanctlError

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 8e-3, "bfloat16": 6e-2}
"""The largest error by dtype, relative to an element's size plus the tensor's root mean square.

For 16-bit types this is eight roundings: some gradients are sums of a few rounded terms.
"""
_IMAGES_AT_ONCE = 4  # in float64, unfolded: a GiB or so


class WrongResultError(SanctlError):
    """An operator's result is not that of float64."""


def check(case: Case, backend: str, device: torch.device) -> None:
    """Compare the output and the gradients of an operator with its baseline in float64.

    The memory that the operator is given holds NaN, so that what it leaves unwritten is noticed.

    Args:
        case: The operator and its inputs.
        backend: The name of the backend, which is set already.
        device: Where to compute.

    Raises:
        WrongResultError: A result differs by more than `TOLERANCES` allow.
    """
    drawn = InputSet.draw(case, device)
    with poisoned_memory():
        results = _results(case, backend, drawn.inputs, drawn.grad)
    worst = [0.0] * len(results)
    for images in _parts(case):
        inputs = [x.detach()[images].double().requires_grad_() for x in drawn.inputs]
        wanted = _results(case, UNFOLD, inputs, drawn.grad[images].double())
        for index, want in enumerate(wanted):
            worst[index] = max(worst[index], worst_error(results[index][images], want))
    for direction, error in (("forward", worst[0]), ("backward", max(worst[1:]))):
        if error > TOLERANCES[case.dtype]:
            raise WrongResultError(
                f"{case}, {direction}, backend {backend}: the result is wrong: error {error:.2g} "
                f"against float64, allowed {TOLERANCES[case.dtype]:.2g}; nothing was timed"
            )


def _parts(case: Case) -> list[slice]:
    """Return the images, a few at a time, for a reference that takes much memory.

    Images that depend on each other stay together; their reference has no windows to unfold.
    """
    if case.operator.couples_images:
        return [slice(None)]
    starts = range(0, case.batch, _IMAGES_AT_ONCE)
    return [slice(start, start + _IMAGES_AT_ONCE) for start in starts]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Have torch fill every tensor that it makes without values with NaN."""
    mode = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that are not deterministic
        try:
            torch.set_deterministic_debug_mode("warn")
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)


def worst_error(result: Tensor, wanted: Tensor) -> float:
    """Return the largest error in `result`, relative as in `TOLERANCES`; infinite for NaN.

    Args:
        result: What was computed.
        wanted: What it should be, in float64.
    """
    scale = wanted.abs() + wanted.square().mean().sqrt()
    error = (result.double() - wanted).abs() / scale
    return float(error.nan_to_num(nan=math.inf).max())


def _results(
    case: Case, backend: str, inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of the inputs."""
    output = case.run(backend, list(inputs))
    return output.detach(), *torch.autograd.grad(output, inputs, grad)
