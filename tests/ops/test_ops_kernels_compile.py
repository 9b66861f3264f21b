"""The kernels without a GPU: all of them compile, and are launched with what they declare."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from kernel_instances import HIDDEN_TILES, TEMPLATES, instances
from kernels_on_cpu import take_cpu_for_gpu
from op_cases import CASES, OPERATORS, Case, Operator, make_inputs
from pairwise_oracle import PairwiseCase, draw, fused
from patchwise_cases import Case as PatchwiseCase
from patchwise_cases import attended
from pooling_cases import PoolingCase
from pooling_cases import draw as draw_pooled
from pooling_cases import fused as pooled
from torch import Tensor

import sanctl_ops
from sanctl_ops.checks import DTYPES
from sanctl_ops.kernels import (
    channels,
    geometry,
    halves,
    pairwise_narrow,
    pairwise_planes,
    pairwise_tiles,
    patchwise_plan,
    pooling,
    runtime,
)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Machine code, but not the fastest: that takes ten times as long.
QUICKLY = ("--Ofast-compile=max", "--split-compile=0")
DECLARATION = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^)]*)\)")
# What a parameter's C++ type takes.
STRUCTURES = {
    "Cut": pairwise_planes.CUT,
    "Deal": geometry.DEAL,
    "Divisor": geometry.DIVISOR,
    "Pool": pooling.POOL,
    "Shape": patchwise_plan.SHAPE,
    "Strides": geometry.STRIDES,
    "Squares": pairwise_narrow.SQUARES,
    "Tiling": pairwise_tiles.TILING,
    "Window": geometry.WINDOW,
}
PASSED = {"int": int, "unsigned": np.uint32, "double": float} | dict.fromkeys(
    STRUCTURES, np.ndarray
)

# Vectors of 8, 4, 2 and 1 pixels; 16-bit ones of 4 and 2 also where tensor cores do not serve: rows
# that are too long for them, and planes that no vector of theirs divides.
SIDES = ((8, 8), (5, 4), (5, 6), (5, 7), (4, 512), (4, 516))
SAME_CASES = [
    Case("same", height, width, k, padding=k // 2, pad_mode=mode, channels=2, shared=1)
    for height, width in SIDES
    for k in geometry.SAME_KERNEL_SIZES
    for mode in ("reflect", "zero")
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", TEMPLATES)
def test_every_instance_compiles(source: str, architecture: str) -> None:
    nvrtc = pytest.importorskip(
        "cupy_backends.cuda.libs.nvrtc", reason="needs the NVRTC of CuPy", exc_type=ImportError
    )
    program = nvrtc.createProgram(runtime.source_text(source), source, (), ())
    wanted = [instance.expression for instance in instances(source)]
    for expression in wanted:
        nvrtc.addNameExpression(program, expression)
    try:
        nvrtc.compileProgram(
            program, (*runtime.OPTIONS, f"--gpu-architecture={architecture}", *QUICKLY)
        )
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    binary = nvrtc.getCUBIN(program)
    assert all(nvrtc.getLoweredName(program, name).encode() in binary for name in wanted)


def declarations() -> dict[str, dict[str, list[str]]]:
    """Return the types of every kernel's parameters, by file and name."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in runtime.SOURCES.glob("*.cu"):
        text = path.read_text(encoding="utf-8")
        kernels_of_file = DECLARATION.findall(text)
        assert len(kernels_of_file) == text.count("__global__"), f"{path.name} is not understood"
        found[path.name] = {
            name: [parameter.strip().rpartition(" ")[0] for parameter in parameters.split(",")]
            for name, parameters in kernels_of_file
        }
    return found


def test_no_kernel_is_forgotten() -> None:
    declared = {source: set(names) for source, names in declarations().items()}
    assert {source: set(names) for source, names in TEMPLATES.items()} == declared
    assert not any("__global__" in p.read_text() for p in runtime.SOURCES.glob("*.cuh"))


@dataclass
class Launches:
    """Stands in for `launch`: nothing runs, and what was to run is written down."""

    kernels: set[runtime.Kernel]
    declared: dict[str, dict[str, list[str]]]

    def __call__(
        self,
        kernel: runtime.Kernel,
        device: torch.device,
        blocks: int,
        threads: int,
        arguments: Sequence[Any],
        shared_bytes: int = 0,
    ) -> None:
        self.kernels.add(kernel)
        types = self.declared[kernel.source][kernel.expression.partition("<")[0]]
        assert len(arguments) == len(types), kernel
        for argument, declared in zip(arguments, types, strict=True):
            wanted = Tensor if declared.endswith("*") else PASSED[declared]
            assert isinstance(argument, wanted), (kernel, declared, argument)
            if isinstance(argument, np.ndarray):
                assert argument.dtype == f"V{STRUCTURES[declared].itemsize}"
        assert 0 <= blocks < 2**31
        assert threads % geometry.WARP == 0
        assert 0 < threads <= 1024
        assert 0 <= shared_bytes <= runtime.MOST_SHARED_BYTES


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Let the operators take tensors of the CPU as if kernels could run there."""
    recorded = Launches(set(), declarations())
    take_cpu_for_gpu(monkeypatch, recorded)
    return recorded


# Every padded number of channels, of blocks of values, and window, and planes of several tiles.
PAIRWISE_CASES = [
    PairwiseCase("pairwise", rel, shared, height, width, k, group=group, running1=k == 5)
    for rel, shared in ((4, 2), (5, 8), (16, 4), (16, 8), (24, 16), (64, 32), (128, 64))
    for group in (1, 2, 4, 8)
    for height, width, k in ((4, 4, 3), (5, 7, 5), (20, 12, 7), (6, 300, 7))
    if shared * group % 8 == 0 and width * shared * rel < 50000
]


POOLING_CASES = [
    PoolingCase("", *sides, channels, image_channels, running=running)
    for sides, channels in (((2, 3), 8), ((70, 71), 64), ((5, 4), 2048))
    for image_channels in (None, 1, 2, 3, 4)
    for running in (False, True)
    if image_channels is None or channels < 2048
]


def run(operator: Operator, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(operator, case, "cpu", dtype)
    out = operator.run(*inputs, case.geometry)
    torch.autograd.grad(out, inputs, torch.zeros_like(out))


def test_launches_fit_the_declarations_and_are_all_compiled(launches: Launches) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in DTYPES:
        for operator in OPERATORS.values():
            for case in (*CASES, *SAME_CASES):
                run(operator, case, dtype)
        for shape in ((2, 3, 4, 6), (2, 3, 5, 7), (1, 800, 1, 1)):
            x = torch.zeros(shape, dtype=dtype, requires_grad=True)
            out, *_ = sanctl_ops.batch_norm_relu(x, torch.ones(shape[1]), torch.ones(shape[1]))
            torch.autograd.grad(out, x, torch.zeros_like(out))
        x = torch.zeros(2, 5, 6, 24, dtype=dtype, requires_grad=True)
        out, *_ = sanctl_ops.batch_norm_relu(x.movedim(-1, 1), torch.ones(24), torch.ones(24))
        torch.autograd.grad(out, x, torch.zeros_like(out))
    for dtype, pooling_case in itertools.product(channels.DTYPES, POOLING_CASES):
        pooled_inputs = draw_pooled(pooling_case).to("cpu", dtype, torch.float32)
        out, *_ = pooled(pooled_inputs)
        torch.autograd.grad(out, pooled_inputs.leaves, torch.zeros_like(out))
    for dtype in halves.DTYPES:
        for case in PAIRWISE_CASES:
            inputs = draw(case).converted("cpu", dtype, torch.float32)
            out = fused(inputs).out
            torch.autograd.grad(out, inputs.leaves, torch.zeros_like(out))
    torch.set_float32_matmul_precision("high")
    hidden_channels = (2, *(8 * tiles for tiles in HIDDEN_TILES))
    for dtype, hidden, size in itertools.product(halves.DTYPES, hidden_channels, (3, 5, 7)):
        x = PatchwiseCase("", 9, 8, size, relation=hidden * 2, hidden=hidden).inputs()
        attended(x.to("cpu", dtype, torch.float32), torch.zeros_like(x.value))
    compiled = {instance for source in TEMPLATES for instance in instances(source)}
    assert launches.kernels - compiled == set(), "asked for, but not compiled here"
    names = {(kernel.source, kernel.expression.partition("<")[0]) for kernel in launches.kernels}
    assert names == {(source, name) for source in TEMPLATES for name in TEMPLATES[source]}
