"""Where a run computes: the device, its precision, and its determinism."""

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from sanctl.config.schema import TrainConfig
from sanctl.errors import UserError
from sanctl_ops import BackendError, Choice, choose_backend

# Parameters of glibc's mallopt (malloc.h), and a size in bytes above any activation's.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 30


def choose_device(name: str | None, gpus: list[int]) -> torch.device:
    """Resolve `cpu`, `cuda`, `cuda:N`, or None: the first configured GPU, else the CPU.

    Args:
        name: what the user asked for.
        gpus: the GPU numbers of the configuration, of which a single process takes the first.

    Raises:
        UserError: the name is no device, the machine does not have it, or the backend of the
            operators that is asked for by name cannot run there.
    """
    device = _find_device(name, gpus)
    operators_backend(device)
    return device


def _find_device(name: str | None, gpus: list[int]) -> torch.device:
    count = torch.cuda.device_count()
    if name is None:
        name = f"cuda:{min(gpus[0] if gpus else 0, count - 1)}" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} CUDA devices; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use cpu, cuda or cuda:N")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def operators_backend(device: torch.device) -> Choice:
    """What runs the attention operators on a device, and why.

    Raises:
        UserError: SANCTL_OPS_BACKEND names no backend, or one that cannot run there.
    """
    try:
        return choose_backend(device)
    except BackendError as error:
        raise UserError(str(error)) from None


def describe_device(device: torch.device) -> str:
    """The device as a person would name it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda:{device.index or 0})"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


@dataclass(frozen=True)
class Precision:
    """The arithmetic of forward and backward passes.

    Attributes:
        device_type: "cpu" or "cuda".
        autocast_dtype: bfloat16 or float16 under automatic mixed precision, else None.
    """

    device_type: str
    autocast_dtype: torch.dtype | None = None

    @classmethod
    def choose(cls, amp: bool, device: torch.device) -> "Precision":
        """Mixed precision if asked for and on a GPU: bfloat16 where the GPU computes in it."""
        if not amp or device.type != "cuda":
            return cls(device.type)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return cls("cuda", torch.bfloat16 if bf16 else torch.float16)

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which forward passes run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.autocast_dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A scaler against underflow, which does nothing unless the arithmetic is float16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.autocast_dtype is torch.float16)

    def __str__(self) -> str:
        """As shown to the user."""
        if self.autocast_dtype is None:
            return "float32"
        return f"mixed {str(self.autocast_dtype).removeprefix('torch.')}"


def prepare_backends(train: TrainConfig, device: torch.device) -> None:
    """Seed torch and choose between fast and repeatable arithmetic for this process."""
    if train.manual_seed is not None:
        torch.manual_seed(train.manual_seed)
    if device.type != "cuda":
        keep_freed_memory()
        return
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = not train.deterministic
    torch.set_float32_matmul_precision("highest" if train.deterministic else "high")
    torch.backends.cudnn.allow_tf32 = not train.deterministic
    if train.deterministic:
        # cuBLAS reads this when its handle is made, which is at the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(train.deterministic)


def keep_freed_memory() -> None:
    """Let this process reuse large buffers instead of giving each back to the system.

    By default glibc does give them back, and a training step on a CPU spends a good part of its
    time on having the pages of its activations handed out again, zeroed. Other C libraries are
    left as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _LARGE)


def place(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move a model to the device, in the memory format of the run."""
    if channels_last:
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)
