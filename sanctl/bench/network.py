"""One network of `bench-models`: built for its step, and what it holds and computes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sanctl_models import compile_network, create_model

CLASSES = 1000


@dataclass(frozen=True)
class ModelSettings:
    """How networks are run.

    Attributes:
        mode: "train" (forward, cross-entropy, backward, SGD with momentum) or "infer" (forward in
            evaluation mode).
        batch: Images in a step of one process.
        size: Side of the images in pixels.
        autocast_dtype: Of automatic mixed precision; None for float32.
        compiled: Run through torch.compile.
        channels_last: Memory layout of weights and images.
    """

    mode: str
    batch: int
    size: int
    autocast_dtype: torch.dtype | None = None
    compiled: bool = False
    channels_last: bool = False

    @property
    def trains(self) -> bool:
        """Whether a step updates the weights."""
        return self.mode == "train"


WAYS = {"eager": False, "compiled": True}


def resolve(label: str, settings: ModelSettings) -> tuple[str, ModelSettings]:
    """Return the network that a label names, and how it is run.

    Args:
        label: The network's name, or `NAME:eager` or `NAME:compiled`, which overrule the settings.
        settings: How networks are run.
    """
    name, _, way = label.partition(":")
    return name, replace(settings, compiled=WAYS[way]) if way else settings


class RunningNetwork:
    """A network with initial weights, its optimizer and a batch of random images on a device."""

    def __init__(self, label: str, settings: ModelSettings, device: torch.device) -> None:
        name, settings = resolve(label, settings)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        model = create_model(name, num_classes=CLASSES)
        model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self._settings = settings
        self._device = device
        self._model = model.train(settings.trains)
        self._replica: nn.Module | None = None
        self._forward = self._as_set(model)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scaled = settings.autocast_dtype is torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        images = torch.randn(settings.batch, 3, settings.size, settings.size, device=device)
        self._images = images.contiguous(memory_format=layout)
        self._targets = torch.randint(CLASSES, (settings.batch,), device=device)

    def replicate(self, replicate: Callable[[nn.Module, torch.device], nn.Module]) -> nn.Module:
        """Train a replica from now on; return it.

        Args:
            replicate: Makes a module of the network and its device whose gradients are the mean
                over several processes.
        """
        self._replica = replicate(self._model, self._device)
        self._forward = self._as_set(self._replica)
        return self._replica

    def step(self) -> None:
        """Queue a step."""
        if self._settings.trains:
            self._train()
            return
        with torch.inference_mode(), self._autocast():
            self._forward(self._images)

    def held_bytes(self) -> int:
        """Return what the network holds between steps: weights, optimizer's state, and its batch.

        Gradients are let go of after every step, but those of a replica, which stay in the buffers
        by which they are exchanged.
        """
        held = sum(tensor.nbytes for tensor in self._tensors())
        if self._replica is not None:
            held += sum(weight.nbytes for weight in self._model.parameters())
        return held

    def _as_set(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the network compiled, or as it is."""
        if not self._settings.compiled:
            return network
        return compile_network(network, {self._settings.batch}, cuda_graphs=True)

    def _train(self) -> None:
        with self._autocast():
            loss = F.cross_entropy(self._forward(self._images), self._targets)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> torch.autocast:
        dtype = self._settings.autocast_dtype
        return torch.autocast(self._device.type, dtype, enabled=dtype is not None)

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._model.state_dict().values()
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield self._images
        yield self._targets


def count_flops(label: str, settings: ModelSettings) -> float:
    """Return the floating-point operations of a step per image, two to a multiply-add.

    They are counted by torch without computing anything, forward or forward and backward, and are
    those of the network's definition: what a kernel computes twice counts once.
    """
    name, _ = resolve(label, settings)
    with torch.device("meta"):
        model = create_model(name, num_classes=CLASSES).train(settings.trains)
        images = torch.empty(settings.batch, 3, settings.size, settings.size)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(settings.trains):
        logits = model(images)
        if settings.trains:
            logits.sum().backward()
    return counter.get_total_flops() / settings.batch
