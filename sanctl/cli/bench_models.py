"""`sanctl bench-models`: networks against each other, interleaved in one run."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sanctl.cli.arguments import Device
from sanctl.cli.bench_options import (
    CsvFile,
    JsonFile,
    choose_operators,
    figure,
    listed,
    note,
    open_device,
    require_known,
    require_places,
    write_files,
)
from sanctl.cli.bench_plan import Outcome, Plan
from sanctl.cli.bench_scaling import choose_processes, measure_scaling
from sanctl.cli.processes import PANEL, Nproc
from sanctl.errors import SanctlError

if TYPE_CHECKING:
    import torch

    from sanctl.bench.models import ModelRecord
    from sanctl.bench.network import ModelSettings

_DEFAULT_MODELS = ["resnet50", "resnet26", "san10_pairwise", "san10_patchwise"]
_DEFAULT_BATCH = {"cuda": 64, "cpu": 2}
_DEFAULT_ROUNDS = {"cuda": 5, "cpu": 3}
_COLUMNS = ("network", "images/s", "ratio", "step ms", "+-%", "peak GiB", "TFLOP/s")


def bench_models(
    models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Networks, as `sanctl models` lists them; repeatable. NAME:eager and "
            f"NAME:compiled overrule --compile. Default: {','.join(_DEFAULT_MODELS)}.",
        ),
    ] = None,
    reference: Annotated[
        str, typer.Option(metavar="NAME", help="Network that the others are compared with.")
    ] = "resnet50",
    mode: Annotated[
        str, typer.Option(metavar="train|infer", help="Steps of training, or forward alone.")
    ] = "train",
    amp: Annotated[
        bool, typer.Option("--amp", help="Mixed precision, as by the key TRAIN.amp.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Use torch.compile and CUDA graphs; to compile is not timed."
        ),
    ] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Use the channels_last memory layout.")
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images in a step, of each process. Default: 64 on a GPU, 2 on a CPU."
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Side of the images in pixels.")] = 224,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of every network. Default: 5 on a GPU, 3 on a CPU."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="auto|torch|cupy", help="What runs attention. Default: auto."),
    ] = None,
    device: Device = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,...",
            help="GPUs, a process each: the speed of the first alone and of all together, each at "
            "--batch images a step (weak scaling), and their ratio.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    nproc: Nproc = None,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Time networks in turns within one run, and compare their speed with one of them.

    With --gpus or --nproc, several processes are compared with one in the same
    rounds; they train together as those of `sanctl train` do, or infer side by side.
    """
    require_places(json, csv)

    import torch

    from sanctl.bench.export import circumstances
    from sanctl.bench.network import ModelSettings
    from sanctl.engine.placement import LaunchOptions
    from sanctl.report.console import out

    names = _networks(models, reference)
    require_known("--mode", mode, ["train", "infer"])
    if backend is not None:
        require_known("--backend", backend, ["auto", "torch", "cupy"])
    options, placement = LaunchOptions(device, gpus, nproc), None
    if options.launches:
        placement = choose_processes(options)
        target = torch.device(placement.devices[0])
        choice = choose_operators(target, backend)
    else:
        target, choice = open_device(device, backend)
    batch, rounds = batch or _DEFAULT_BATCH[target.type], rounds or _DEFAULT_ROUNDS[target.type]
    settings = ModelSettings(mode, batch, size, _autocast(amp, target), compiled, channels_last)
    plan = Plan(names, reference, settings, rounds, choice.name)
    outcome = measure_scaling(plan, placement) if placement else _measure(plan, target)
    processes = placement.processes if placement else 1
    about = circumstances(outcome.device, _settings(plan, processes))
    _print(outcome, plan)
    out.print(f"{outcome.device}, attention by {choice.name}")
    out.print(outcome.legend)
    write_files(json, csv, about, [record.as_row() for record in outcome.records])
    if all(record.failure for record in outcome.records):
        raise SanctlError("none of the networks could be measured")


def _networks(models: list[str] | None, reference: str) -> list[str]:
    """Return the networks to run, the reference added where it is not among them."""
    names = listed(models or _DEFAULT_MODELS)
    for option, label in (*(("--models", name) for name in names), ("--reference", reference)):
        _require_network(option, label)
    return names if reference in names else [reference, *names]


def _require_network(option: str, label: str) -> None:
    """Raise UserError unless a label is the name of a network, with a way to run it or without."""
    from sanctl.bench.network import WAYS
    from sanctl_models import list_models

    name, colon, way = label.partition(":")
    require_known(option, name, list_models())
    if colon:
        require_known(f"{option} {name}:", way, list(WAYS))


def _autocast(amp: bool, device: "torch.device") -> "torch.dtype | None":
    from sanctl.engine.device import Precision

    dtype = Precision.choose(amp, device).autocast_dtype
    if amp and dtype is None:
        note("--amp has no effect on a CPU: running in float32")
    return dtype


def _precision(settings: "ModelSettings") -> str:
    return str(settings.autocast_dtype or "float32").removeprefix("torch.")


def _settings(plan: Plan, processes: int) -> dict[str, object]:
    return {
        "models": plan.names,
        "reference": plan.reference,
        "rounds": plan.rounds,
        "backend": plan.backend,
        "processes": processes,
        **asdict(plan.settings),
        "autocast_dtype": _precision(plan.settings),
    }


def _measure(plan: Plan, device: "torch.device") -> Outcome:
    """Measure in this process."""
    from sanctl.bench.backends import backend_set
    from sanctl.bench.models import bench_models
    from sanctl.engine.device import describe_device
    from sanctl.report.console import progress
    from sanctl.report.lognotes import log_as_notes

    with (
        backend_set(plan.backend),
        progress("rounds of networks", plan.turns) as advance,
        log_as_notes(note),
    ):
        records = bench_models(
            plan.names, plan.reference, plan.settings, plan.rounds, device, advance
        )
    return Outcome(
        records=records,
        device=describe_device(device),
        columns=_COLUMNS,
        rows=[_row(record) for record in records],
        where="",
        legend=f"ratio: speed over {plan.reference}'s; +-%: half the range over the rounds",
    )


def _print(outcome: Outcome, plan: Plan) -> None:
    from sanctl.report.console import out
    from sanctl.report.tables import print_table

    settings = plan.settings
    switches = {"compiled": settings.compiled, "channels_last": settings.channels_last}
    how = [_precision(settings), *(name for name, on in switches.items() if on)]
    batch = f"batch {settings.batch}{outcome.where}"
    title = f"{settings.mode}, {batch}, {settings.size} px, {', '.join(how)}"
    print_table(outcome.columns, outcome.rows, title=title)
    for record in outcome.records:
        if record.failure:
            out.print(f"{record.network} was not measured: {record.failure}")


def _row(record: "ModelRecord") -> list[str | None]:
    seconds, median = record.step_seconds, record.step_median
    return [
        record.network,
        figure(record.images_per_s),
        None if record.ratio is None else f"{record.ratio:.2f}",
        figure(median, 1e3),
        None if median is None else f"{50 * (max(seconds) - min(seconds)) / median:.1f}",
        figure(record.peak, 1 / 2**30),
        figure(record.flop_per_s, 1e-12),
    ]
