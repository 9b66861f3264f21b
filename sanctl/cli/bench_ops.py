"""`sanctl bench-ops`: the attention operators against the bandwidth of a copy."""

from itertools import groupby, product
from typing import TYPE_CHECKING, Annotated

import typer

from sanctl.cli.arguments import Device
from sanctl.cli.bench_options import (
    CsvFile,
    JsonFile,
    chosen,
    figure,
    note,
    open_device,
    require_known,
    require_places,
    write_files,
)

if TYPE_CHECKING:
    from sanctl.bench.cases import Case
    from sanctl.bench.ops import OpRecord

_DEFAULT_DTYPES = ["float32", "bfloat16"]
_DEFAULT_BATCH = {"cuda": 64, "cpu": 1}
_COLUMNS = ("shape", "pass", "by", "ms", "+-%", "floor", "GB/s", "copy%", "gain", "MiB")
_PASSES = {"forward": "fwd", "backward": "bwd"}  # the table fits on 80 columns
_LEGEND = """\
ms: median time of a call; +-%: half the width of the middle 80 % of the samples
floor: ms in which a copy moves the bytes that the call must; copy%: floor / ms
gain: speed over F.unfold and plain torch
MiB: peak memory beyond the inputs, on a GPU; with the forward pass for bwd"""


def bench_ops(
    op: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Operator; repeatable. Default: all.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Repeatable. Default: float32 and bfloat16."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="layer0 to layer3 of SAN10; repeatable. Default: all."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="torch|cupy", help="Default: every one that can run.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images. Default: 64 on a GPU, 1 on a CPU.")
    ] = None,
    layout: Annotated[
        str, typer.Option(metavar="contiguous|channels_last", help="Memory layout of the planes.")
    ] = "contiguous",
    device: Device = None,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Time the attention operators, forward and backward, beside a copy and plain torch.

    Every result is first compared with float64; if one is wrong, nothing is timed.
    """
    require_places(json, csv)

    from sanctl.bench.export import circumstances
    from sanctl.bench.ops import bench_ops
    from sanctl.engine.device import describe_device
    from sanctl.report.console import out, progress
    from sanctl.report.lognotes import log_as_notes

    if backend is not None:
        require_known("--backend", backend, ["torch", "cupy"])
    target, choice = open_device(device, backend or "auto")
    backends = [backend] if backend else sorted({"torch", choice.name}, reverse=True)
    cases = _cases(op, dtype, shape, layout, batch or _DEFAULT_BATCH[target.type])
    steps = 2 * len(cases) * len(backends)
    with progress("check, then time", steps) as advance, log_as_notes(note):
        records = bench_ops(cases, backends, target, advance)
    about = circumstances(describe_device(target), _settings(cases, backends))
    _print_tables(records)
    out.print(f"{about['device']}: a copy moves {records[0].copy_bytes_per_s / 1e9:.4g} GB/s")
    out.print(_LEGEND)
    write_files(json, csv, about, [record.as_row() for record in records])


def _cases(
    ops: list[str] | None,
    dtypes: list[str] | None,
    shapes: list[str] | None,
    layout: str,
    batch: int,
) -> "list[Case]":
    from sanctl.bench.cases import DTYPES, LAYOUTS, OPERATORS, SHAPES, Case

    require_known("--layout", layout, list(LAYOUTS))
    ops = chosen("--op", ops or OPERATORS, list(OPERATORS))
    dtypes = chosen("--dtype", dtypes or _DEFAULT_DTYPES, list(DTYPES))
    shapes = chosen("--shape", shapes or SHAPES, list(SHAPES))
    return [
        Case(op, shape, dtype, batch, layout) for op, dtype, shape in product(ops, dtypes, shapes)
    ]


def _settings(cases: "list[Case]", backends: list[str]) -> dict[str, object]:
    names = {key: [getattr(case, key) for case in cases] for key in ("op", "dtype", "shape")}
    return {
        **{key: list(dict.fromkeys(values)) for key, values in names.items()},
        "backend": backends,
        "batch": cases[0].batch,
        "layout": cases[0].layout,
    }


def _print_tables(records: "list[OpRecord]") -> None:
    """Print a table for every operator and dtype."""
    from sanctl.report.console import out
    from sanctl.report.tables import print_table

    for (op, dtype), group in groupby(records, lambda each: (each.case.op, each.case.dtype)):
        rows = [_row(record) for record in group]
        print_table(_COLUMNS, rows, title=f"{op}, {dtype}, batch {records[0].case.batch}")
        out.print()


def _row(record: "OpRecord") -> list[str | None]:
    timing = record.timing
    return [
        record.case.shape,
        _PASSES[record.direction],
        record.backend,
        "n/a" if timing is None else figure(timing.median, 1e3),
        None if timing is None else f"{50 * timing.spread:.1f}",
        figure(record.floor, 1e3),
        figure(record.bytes_per_s, 1e-9),
        None if record.share_of_copy is None else f"{100 * record.share_of_copy:.1f}",
        figure(record.speedup),
        figure(record.peak, 1 / 2**20),
    ]
