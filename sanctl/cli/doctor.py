"""`sanctl doctor`: what this machine has for training, what of it works, and what would mend it."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sanctl.errors import SanctlError

if TYPE_CHECKING:
    from sanctl.engine.machine import Gpu, Operators, Version

GIB = 2**30


def doctor() -> None:
    """Show versions, GPUs and what runs the attention operators, and try out what there is.

    The exit status is 1 where something that is there does not work, and 2 where
    SANCTL_OPS_BACKEND asks for what cannot run here.
    """
    import torch

    from sanctl.engine import machine
    from sanctl.engine.device import choose_device
    from sanctl.report.console import out

    versions, gpus = machine.software(), machine.gpus()
    usable = [gpu.device for gpu in gpus if not gpu.problem]
    choices = [machine.operators(device) for device in (*usable, torch.device("cpu"))]
    _print_software(versions)
    _print_gpus(gpus)
    _print_operators(choices)
    problems = [version.problem for version in versions if version.problem]
    problems += [gpu.problem for gpu in gpus if gpu.problem]
    problems += _try_kernels(choices)
    _print_kernel_folder()
    if problems:
        raise SanctlError("; ".join(problems))
    choose_device(None, gpus=[0])  # refuses what `sanctl train` would refuse
    out.print("everything that is here works; see it train with: sanctl demo")


def _print_software(versions: Sequence["Version"]) -> None:
    from sanctl.engine import machine
    from sanctl.report.console import out
    from sanctl.report.tables import print_table
    from sanctl_ops.backend import VARIABLE

    memory = machine.memory()
    rows = [
        *((version.name, version.text) for version in versions),
        ("CPU cores", str(machine.cpu_cores())),
        ("memory", None if memory is None else _gib(memory)),
        (VARIABLE, os.environ.get(VARIABLE)),
    ]
    print_table(["what", "value"], rows)
    out.print()


def _print_gpus(gpus: Sequence["Gpu"]) -> None:
    from sanctl.engine import machine
    from sanctl.report.console import out
    from sanctl.report.tables import print_table

    if gpus:
        rows = [
            (
                str(gpu.device),
                gpu.name,
                gpu.capability,
                _gib(gpu.total),
                None if gpu.free is None else _gib(gpu.free),
            )
            for gpu in gpus
        ]
        print_table(["GPU", "name", "compute capability", "memory", "free"], rows)
    else:
        out.print(f"no GPU: {machine.why_no_gpu()}")
    out.print()


def _print_operators(choices: Sequence["Operators"]) -> None:
    from sanctl.report.console import out
    from sanctl.report.tables import print_table

    rows = [(str(choice.device), choice.backend, choice.reason) for choice in choices]
    print_table(["device", "attention runs on", "because"], rows)
    out.print()
    for choice in choices:
        if choice.mend:
            out.print(f"{choice.device}: to run the CuPy kernels: {choice.mend}")


def _try_kernels(choices: Sequence["Operators"]) -> list[str]:
    """Compile a kernel for each GPU that runs them; return what failed."""
    from sanctl.engine import machine
    from sanctl.report.console import out

    problems = []
    for choice in choices:
        if choice.backend == "cupy":
            works, line = machine.compile_kernel(choice.device)
            if works:
                out.print(f"{choice.device}: {line}")
            else:
                problems.append(f"{choice.device}: {line}")
    return problems


def _print_kernel_folder() -> None:
    from sanctl.engine import machine
    from sanctl.report.console import out

    folder = machine.kernel_folder()
    if folder is not None:
        state = "writable" if folder.writable else "not writable; choose another by CUPY_CACHE_DIR"
        out.print(f"compiled kernels are kept in {folder.path} ({state})")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
