"""`sanctl dataset check`: damaged images, duplicates, and images in two parts."""

from typing import TYPE_CHECKING

import typer

from sanctl.cli.arguments import AllowOutside, ImagesPath, Workers

if TYPE_CHECKING:
    from sanctl.data.check import Copy, Findings


def check(
    path: ImagesPath = None,
    workers: Workers = None,
    allow_outside: AllowOutside = False,
) -> None:
    """Read every image: name damaged ones, exact duplicates, and the same image in two parts.

    Nothing is written. Exits with 1 when something is found.
    """
    from sanctl.data.check import check_parts
    from sanctl.data.parts import open_parts
    from sanctl.data.workers import worker_count
    from sanctl.report.console import out, progress

    parts = open_parts(path, allow_outside=allow_outside)
    total = sum(len(source) for source in parts.values())
    with progress("check", total=total) as advance:
        findings = check_parts(parts, worker_count(workers, total), advance)
    if findings.clean:
        where = f" in {', '.join(parts)}" if len(parts) > 1 else ""
        out.print(f"{total} images{where}: no damage, no duplicates, no image in two parts")
        return
    _print_findings(findings)
    raise typer.Exit(1)


def _print_findings(findings: "Findings") -> None:
    """Print a line for each finding, then how many there are."""
    from sanctl.report.console import out, printable

    for part, name, reason in findings.damaged:
        out.print(f"damaged ({part}): {printable(name)}: {printable(reason)}")
    for group in findings.duplicates:
        names = " = ".join(printable(copy.name) for copy in group)
        out.print(f"duplicate ({group[0].part}): {names}{_labels(group)}")
    for group in findings.leaks:
        names = " = ".join(f"{printable(copy.name)} ({copy.part})" for copy in group)
        out.print(f"leak: {names}{_labels(group)}")
    out.print(
        f"{findings.images} images: {len(findings.damaged)} damaged, "
        f"{len(findings.duplicates)} groups of duplicates, "
        f"{len(findings.leaks)} groups in several parts"
    )


def _labels(group: "list[Copy]") -> str:
    """Return a remark where the same image has several classes."""
    from sanctl.report.console import printable

    labels = sorted({copy.label for copy in group})
    return f"; of different classes: {printable(', '.join(labels))}" if len(labels) > 1 else ""
