"""Compiling the kernels with CuPy and launching them on torch's current device and stream."""

import importlib
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parent
OPTIONS = ("--std=c++17",)
TYPES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "float",
    torch.float64: "double",
}
# What a block may ask for on every GPU since compute capability 8.0, in bytes, and what it gets
# without asking.
MOST_SHARED_BYTES = 96 * 1024
UNASKED_SHARED_BYTES = 48 * 1024

_logger = logging.getLogger("sanctl_ops")

Argument = Tensor | int | float | np.ndarray | np.generic


class Kernel(NamedTuple):
    """One instantiation of a kernel template.

    Attributes:
        source: the file in this folder, "aggregation.cu".
        expression: the instantiation in C++, "aggregation<float, true>".
    """

    source: str
    expression: str


@lru_cache(maxsize=None, typed=True)
def kernel(source: str, name: str, *parameters: torch.dtype | bool | int) -> Kernel:
    """Return the instantiation `name<parameters>` of a template in `source`."""
    spelled = [
        TYPES[p]
        if isinstance(p, torch.dtype)
        else str(p).lower()
        if isinstance(p, bool)
        else str(p)
        for p in parameters
    ]
    return Kernel(source, f"{name}<{', '.join(spelled)}>")


def launch(
    kernel: Kernel,
    device: torch.device,
    blocks: int,
    threads: int,
    arguments: Sequence[Argument],
    shared_bytes: int = 0,
) -> None:
    """Put a kernel on torch's current stream of `device`, compiling it first if it is new.

    Args:
        kernel: what to launch.
        device: where the tensors among the arguments lie.
        blocks: blocks of the grid; with none, nothing is launched.
        threads: threads of a block.
        arguments: tensors are passed as pointers, int as 32-bit int, float as double, and NumPy
            scalars and structures of one element as they are.
        shared_bytes: dynamic shared memory of a block.
    """
    if blocks == 0:
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, device, blocks, threads, arguments, shared_bytes)
        return
    # Triton's way to the stream; `torch.cuda.current_stream` makes an object each time.
    stream = _shared_with_cupy(torch._C._cuda_getCurrentRawStream(device.index), device.index)
    function = _function(kernel, device.index, shared_bytes > UNASKED_SHARED_BYTES)
    passed = [
        _int32(x) if isinstance(x, int) else x.data_ptr() if isinstance(x, Tensor) else x
        for x in arguments
    ]
    function((blocks,), (threads,), passed, shared_mem=shared_bytes, stream=stream)


@dataclass(frozen=True)
class _Stream:
    """A stream of torch's as the protocol `__cuda_stream__` describes one."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@lru_cache(maxsize=64)
def _shared_with_cupy(pointer: int, device_index: int) -> Any:
    """Return CuPy's name for a stream of torch's; making it takes longer than a launch."""
    cupy = importlib.import_module("cupy")
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 and newer
        return cupy.cuda.Stream.from_external(_Stream(pointer))
    return cupy.cuda.ExternalStream(pointer, device_index)


def source_text(name: str) -> str:
    """Return a source with its own headers in place of the `#include` lines.

    CuPy's cache on disk goes by the text it is given, and would miss a change in a header.
    """
    included: set[str] = set()

    def expand(file: str) -> str:
        included.add(file)
        text = (SOURCES / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(
            r'#include "(.*)"\n', lambda m: "" if m[1] in included else expand(m[1]), text
        )

    return expand(name)


def compile_probe(device: torch.device) -> str:
    """Compile one kernel for a GPU, bypassing nothing, and say how long it took, in one line.

    Raises:
        Exception: whatever CuPy or NVRTC raise; the first line of the message tells the cause.
    """
    probe = kernel("subtraction2.cu", "subtraction2_same", torch.float32, True, 7, 4)
    start = time.perf_counter()
    with torch.cuda.device(device):
        _compiled.__wrapped__(probe).kernel  # noqa: B018  (the attribute compiles and loads it)
    seconds = time.perf_counter() - start
    major, minor = torch.cuda.get_device_capability(device)
    return f"subtraction2 compiled for sm_{major}{minor} or found compiled in {seconds:.2f} s"


@cache
def _compiled(kernel: Kernel) -> Any:
    """Return a kernel as CuPy's callable, which holds a binary for each GPU it is used on."""
    _tell_once()
    cupy = importlib.import_module("cupy")
    module = cupy.RawModule(
        code=source_text(kernel.source),
        options=OPTIONS,
        name_expressions=(kernel.expression,),
    )
    return module.get_function(kernel.expression)


@cache
def _tell_once() -> None:
    _logger.info(
        "preparing the CuPy kernels; each is compiled at its first use, which takes a second or "
        "less, and kept in CuPy's cache on disk"
    )


@cache
def _function(kernel: Kernel, device_index: int, most_shared_memory: bool) -> Any:
    """Return a kernel as loaded on the current device, whose index this is."""
    compiled = _compiled(kernel)
    if most_shared_memory:
        compiled.max_dynamic_shared_size_bytes = MOST_SHARED_BYTES
    return compiled.kernel


# Looked up three times as fast as made.
_int32 = lru_cache(maxsize=4096)(np.int32)
