"""`sanctl dataset stats`: how many images of what kind a dataset has."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanctl.cli.arguments import AllowOutside, ImagesPath, Workers

if TYPE_CHECKING:
    from sanctl.data.stats import PartStats, Spread

_SHOWN_CLASSES = 20


def stats(
    path: ImagesPath = None,
    grayscale: Annotated[
        bool, typer.Option("--grayscale", help="Measure the pixels as gray.")
    ] = False,
    depth: Annotated[
        int, typer.Option(min=1, help="Levels below a plain folder at which class folders lie.")
    ] = 1,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all figures to a JSON file.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the images per class to a CSV file.")
    ] = None,
    workers: Workers = None,
    allow_outside: AllowOutside = False,
) -> None:
    """Count classes, sizes and formats, and measure mean and deviation of the pixels."""
    from sanctl.data.parts import open_parts
    from sanctl.data.stats import measure_source, write_stats_csv, write_stats_json
    from sanctl.data.workers import worker_count
    from sanctl.report.console import out, printable, progress

    parts = {}
    for part, source in open_parts(path, depth, allow_outside).items():
        count = worker_count(workers, len(source))
        with progress(f"measure {part}", total=len(source)) as advance:
            parts[part] = measure_source(source, 1 if grayscale else 3, count, advance)
    _print_figures(parts)
    _print_classes(parts)
    _print_normalisation(parts)
    for file, write in ((json, write_stats_json), (csv, write_stats_csv)):
        if file is not None:
            write(parts, file)
            out.print(f"wrote {printable(str(file))}")


def _print_figures(parts: "dict[str, PartStats]") -> None:
    from sanctl.report.tables import print_table

    columns = [_figures(part) for part in parts.values()]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    print_table(["", *parts], rows)


def _figures(part: "PartStats") -> dict[str, str]:
    least, _, most = part.per_class
    return {
        "images": f"{part.images}",
        "unreadable": f"{part.unreadable}",
        "classes": f"{len(part.counts)}",
        "per class (least, median, most)": _spread(part.per_class),
        "most / least": f"{most / least:.2f}" if least else "a class is empty",
        "width in px": _spread(part.width),
        "height in px": _spread(part.height),
        "formats": ", ".join(f"{name} {count}" for name, count in part.formats.items()),
        "mean": _numbers(part.mean),
        "std": _numbers(part.std),
    }


def _spread(spread: "Spread") -> str:
    return f"{spread.least}, {spread.median:g}, {spread.most}"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _print_classes(parts: "dict[str, PartStats]") -> None:
    """Print every class, or of many the smallest and the largest."""
    from sanctl.data.stats import class_rows
    from sanctl.report.console import out
    from sanctl.report.tables import print_table

    classes = class_rows(parts)
    columns = ["class", *parts]
    out.print()
    if len(classes) <= _SHOWN_CLASSES:
        print_table(columns, [_row(*each) for each in classes], title="Images per class")
        return
    ranked = [_row(*each) for each in sorted(classes, key=lambda each: sum(each[1]))]
    half = _SHOWN_CLASSES // 2
    print_table(columns, ranked[:half], title=f"The {half} smallest of {len(classes)} classes")
    out.print()
    print_table(columns, ranked[: -half - 1 : -1], title=f"The {half} largest")
    out.print("--csv FILE writes every class")


def _row(name: str, counts: list[int]) -> list[str | int]:
    return [name, *counts]


def _print_normalisation(parts: "dict[str, PartStats]") -> None:
    """Print the configuration's lines for the images that a network is trained on."""
    from sanctl.report.console import err, out

    part = parts.get("train") or next(iter(parts.values()))
    if not part.mean:
        return
    alike = len(set(part.mean)) == len(set(part.std)) == 1
    mean, std = (values[:1] if alike else values for values in (part.mean, part.std))
    gray = "; all channels are alike: the images are gray" if alike and len(part.mean) > 1 else ""
    out.print(f"\nfor the section DATA of a configuration{gray}")
    if alike:
        out.print("  grayscale: true")
    out.print(f"  mean: [{_numbers(mean)}]\n  std: [{_numbers(std)}]")
    if any(each.unreadable for each in parts.values()):
        err.print("warning: unreadable images; `sanctl dataset check` names them")
