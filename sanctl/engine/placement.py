"""Where the processes of a run go: which devices of this machine, and how many machines."""

from dataclasses import dataclass
from urllib.parse import urlsplit

import torch

from sanctl.config.schema import Config
from sanctl.engine.device import choose_device
from sanctl.engine.membership import Membership
from sanctl.errors import UserError


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line says of processes; None where it says nothing.

    Attributes:
        device: cpu, cuda or cuda:N.
        gpus: numbers of this machine's GPUs, as `0,1`.
        nproc: processes on this machine.
        nnodes: machines.
        node_rank: this machine's number.
        endpoint: HOST:PORT of machine 0, where they meet.
        max_restarts: how often failed processes are started again.
    """

    device: str | None = None
    gpus: str | None = None
    nproc: int | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    endpoint: str | None = None
    max_restarts: int = 0

    @property
    def launches(self) -> bool:
        """Whether they ask for processes to be started."""
        wishes = (self.gpus, self.nproc, self.nnodes, self.node_rank, self.endpoint)
        return any(wish is not None for wish in wishes) or self.max_restarts > 0


@dataclass(frozen=True)
class Placement:
    """The processes of a run.

    Attributes:
        devices: of this machine's processes.
        nodes, node: how many machines there are, and which this one is.
        host, port: where they meet; port 0 is any that is free.
        backend: "nccl" or "gloo".
        notes: what the user should know of the choice.
    """

    devices: tuple[str, ...]
    nodes: int = 1
    node: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    backend: str = "gloo"
    notes: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        """How many there are on all machines, each of which has as many as this one."""
        return len(self.devices) * self.nodes


def place_processes(config: Config, options: LaunchOptions) -> Placement:
    """Decide how many processes to start, and on what.

    Raises:
        UserError: options or configuration ask for what this machine does not have, or for what
            makes no sense.
    """
    devices, notes = local_devices(options, config.TRAIN.train_gpu)
    nodes, node = _machines(config, options)
    host, port = _meeting_point(config, options, nodes)
    placement = Placement(
        tuple(devices), nodes, node, host, port, backend_of(config, devices[0]), tuple(notes)
    )
    require_images_for_all(config, placement.processes)
    return placement


def member_device(config: Config, options: LaunchOptions, member: Membership) -> str:
    """The device of a process that torchrun or srun has started.

    Raises:
        UserError: this machine does not have one for it.
    """
    count = torch.cuda.device_count()
    if options.device == "cpu" or (options.device is None and not count):
        return "cpu"
    if options.device not in (None, "cuda"):
        raise UserError(f"--device {options.device}: one of several processes takes cpu or cuda")
    if count == 1:  # a scheduler shows each process its own
        return "cuda:0"
    listed = config.TRAIN.train_gpu
    gpus = listed if len(listed) == member.local_size else list(range(count))
    if member.local_rank >= len(gpus) or gpus[member.local_rank] >= count:
        raise UserError(
            f"process {member.local_rank} of this machine has no GPU: it has {count}; start one "
            "process for each, or use --device cpu"
        )
    return f"cuda:{gpus[member.local_rank]}"


def backend_of(config: Config, device: str) -> str:
    """The communication library between processes on devices like this one.

    Raises:
        UserError: it is none that can be used.
    """
    if device == "cpu":
        return "gloo"
    backend = config.Distributed.dist_backend
    if backend not in ("nccl", "gloo"):
        raise UserError(f"Distributed.dist_backend {backend}: use nccl, or gloo")
    return backend


def require_images_for_all(config: Config, processes: int) -> None:
    """Make sure that every process has an image of a whole batch.

    Raises:
        UserError: there are more processes.
    """
    if config.TRAIN.batch_size < processes:
        raise UserError(
            f"TRAIN.batch_size {config.TRAIN.batch_size}: fewer images than the {processes} "
            "processes that share them; raise it, or use fewer processes"
        )


def local_devices(options: LaunchOptions, listed: list[int]) -> tuple[list[str], list[str]]:
    """The devices of this machine's processes, and what the user should know of the choice.

    Args:
        options: of the command line.
        listed: the GPUs of the configuration.

    Raises:
        UserError: the options ask for what this machine does not have, or for what makes no sense.
    """
    devices, notes = _devices(options, listed)
    for device in devices:
        choose_device(device, [])  # refuses what there is not
    return devices, notes


def _devices(options: LaunchOptions, listed: list[int]) -> tuple[list[str], list[str]]:
    device, nproc = options.device, options.nproc
    if options.gpus is not None:
        if device not in (None, "cuda"):
            raise UserError(f"--gpus {options.gpus}: leave out --device {device}")
        return _named_gpus(options.gpus, nproc), []
    count = torch.cuda.device_count()
    if device == "cpu" or (device is None and not count):
        return ["cpu"] * (nproc or 1), []
    if device not in (None, "cuda") and nproc not in (None, 1):
        raise UserError(f"--nproc {nproc}: --device {device} is one device; use cpu or cuda")
    if nproc is not None and device in (None, "cuda"):
        return _first_gpus(nproc, listed, count), []
    there = [gpu for gpu in dict.fromkeys(listed) if gpu < count]
    if device is not None or len(there) < 2:
        return [device or str(choose_device(None, listed))], []
    lacking = [str(gpu) for gpu in listed if gpu >= count]
    notes = [f"TRAIN.train_gpu: this machine has no GPU {', '.join(lacking)}"] if lacking else []
    return [f"cuda:{gpu}" for gpu in there], notes


def _named_gpus(text: str, nproc: int | None) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words) or len({int(word) for word in words}) < len(words):
        raise UserError(f"--gpus {text}: not a list of different GPU numbers, as 0,1")
    count = torch.cuda.device_count()
    missing = [word for word in words if int(word) >= count]
    if missing:
        raise UserError(f"--gpus {text}: this machine has {_gpus(count)}, none is {missing[0]}")
    if nproc not in (None, len(words)):
        raise UserError(f"--nproc {nproc}: --gpus {text} lists {len(words)}; leave out --nproc")
    return [f"cuda:{int(word)}" for word in words]


def _first_gpus(nproc: int, listed: list[int], count: int) -> list[str]:
    """As many GPUs: those of TRAIN.train_gpu if it lists so many, else the first."""
    if nproc > count:
        raise UserError(
            f"--nproc {nproc}: this machine has {_gpus(count)}; use --device cpu for processes on "
            "the CPU"
        )
    usable = len(listed) == nproc and max(listed) < count
    return [f"cuda:{gpu}" for gpu in (listed if usable else range(nproc))]


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _machines(config: Config, options: LaunchOptions) -> tuple[int, int]:
    distributed = config.Distributed
    nodes = options.nnodes or distributed.world_size
    node = distributed.rank if options.node_rank is None else options.node_rank
    if nodes == -1 or (nodes > 1 and node == -1):
        raise UserError(
            "Distributed.world_size and rank are -1, from the environment: neither torchrun nor "
            "srun has started this process; use --nnodes and --node-rank"
        )
    if nodes == 1 and options.node_rank in (None, 0):
        return 1, 0
    if node >= nodes:
        raise UserError(f"--node-rank {node}: of {nodes} machines the last is {nodes - 1}")
    return nodes, node


def _meeting_point(config: Config, options: LaunchOptions, nodes: int) -> tuple[str, int]:
    if nodes == 1 and options.endpoint is None:
        return Placement.host, Placement.port
    text = options.endpoint or config.Distributed.dist_url
    try:
        parts = urlsplit(text if "//" in text else f"//{text}")
        if parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:  # the port is none
        pass
    name = "--rdzv-endpoint" if options.endpoint else "Distributed.dist_url"
    raise UserError(f"{name} {text}: no HOST:PORT; name machine 0 and a free port of it")
