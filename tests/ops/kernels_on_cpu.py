"""Runs the kernels on a CPU: their sources, compiled by g++ against `cuda_on_cpu/`.

Threads of a block take turns at barriers, shared memory begins as NaN, and copies ahead of use
arrive no sooner than they are waited for. Only the PTX of `ptx.cuh` is exchanged for C++.
"""

import ctypes
import importlib
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sanctl_ops
from sanctl_ops import backend, kernels
from sanctl_ops.kernels import runtime
from sanctl_ops.kernels.runtime import Kernel

EMULATION = Path(__file__).parent / "cuda_on_cpu"
OPTIONS = ("-std=c++20", "-O1", "-w", "-fPIC")
DECLARATION = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(([^)]*)\)")
ENTRY = """
extern "C" void launch(unsigned blocks, unsigned threads, {parameters}) {{
    run(blocks, threads, [=] {{ {expression}({arguments}); }});
}}
"""


class Launcher:
    """Stands in for `runtime.launch`, compiling each kernel once into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for source in EMULATION.iterdir():
            shutil.copy(source, folder)
        for source in runtime.SOURCES.glob("*.cu*"):
            # ptx.cuh is exchanged. C++ has no word for what is both shared and declared elsewhere.
            if not (folder / source.name).exists():
                text = source.read_text(encoding="utf-8").replace("extern __shared__", "extern")
                (folder / source.name).write_text(text, encoding="utf-8")
        # Parsing the standard library's headers would take most of the time.
        header = folder / "cuda_on_cpu.hpp"
        subprocess.run(["g++", *OPTIONS, "-x", "c++-header", header], check=True)
        self._compiled: dict[Kernel, ctypes.CDLL] = {}
        self.launched: list[Kernel] = []

    def __call__(
        self,
        kernel: Kernel,
        device: torch.device,
        blocks: int,
        threads: int,
        arguments: Sequence[Any],
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel to its end."""
        self.launched.append(kernel)
        if kernel not in self._compiled:
            self._compiled[kernel] = self._compile(kernel)
        kept = [_argument(argument) for argument in arguments]
        self._compiled[kernel].launch(
            ctypes.c_uint(blocks),
            ctypes.c_uint(threads),
            *[ctypes.c_void_p(pointer) for _, pointer in kept],
        )

    def _compile(self, kernel: Kernel) -> ctypes.CDLL:
        name = kernel.expression.partition("<")[0]
        value_type = re.split("[<,>]", kernel.expression)[1]
        text = (self._folder / kernel.source).read_text(encoding="utf-8")
        types = [
            re.sub(r"\b[TA]\b", value_type, parameter.strip().rpartition(" ")[0])
            for parameter in dict(DECLARATION.findall(text))[name].split(",")
        ]
        # Pointers as they are, everything else by its address.
        parameters = [
            f"{t if t.endswith('*') else t + ' const*'} a{i}" for i, t in enumerate(types)
        ]
        arguments = [f"{'' if t.endswith('*') else '*'}a{i}" for i, t in enumerate(types)]
        entry = ENTRY.format(
            parameters=", ".join(parameters),
            expression=kernel.expression,
            arguments=", ".join(arguments),
        )
        program = self._folder / f"kernel{len(self._compiled)}.cpp"
        includes = f'#include "cuda_on_cpu.hpp"\n#include "{kernel.source}"\n'
        program.write_text(includes + entry, encoding="utf-8")
        library = program.with_suffix(".so")
        subprocess.run(["g++", *OPTIONS, "-shared", "-o", library, program], check=True)
        return ctypes.CDLL(str(library))


def _argument(argument: Any) -> tuple[Any, int]:
    """Return what must be kept, and the address of a tensor's data or of the value."""
    if isinstance(argument, Tensor):
        return argument, argument.data_ptr()
    kept = np.asarray(argument, np.int32 if isinstance(argument, int) else None)
    return kept, kept.ctypes.data


def take_cpu_for_gpu(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None]) -> None:
    """Let the operators ask for kernels on a CPU, too, and `launch` be who launches them."""
    for package in (sanctl_ops, kernels):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            if module is not runtime and hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", launch)
            if module is not backend and hasattr(module, "runs_kernels"):
                monkeypatch.setattr(module, "runs_kernels", lambda device: True)
