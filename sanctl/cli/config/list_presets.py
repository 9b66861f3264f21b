"""`sanctl config list`: presets, and the files that are there."""

from pathlib import Path


def list_presets() -> None:
    """List the dataset presets, the model presets, and the files under config/."""
    from sanctl.config.presets import dataset_names, model_names, preset_title
    from sanctl.report.console import out
    from sanctl.report.tables import print_table

    for kind, names in (("datasets", dataset_names()), ("models", model_names())):
        titles = (preset_title(kind, name).partition(": ")[2] for name in names)
        print_table([kind.removesuffix("s"), "what it is"], list(zip(names, titles, strict=True)))
        out.print()
    paths = sorted(Path("config").glob("**/*.yaml"))
    if paths:
        print_table(["file"], [[str(path)] for path in paths])
    else:
        out.print("No files under config/ yet: `sanctl config new DATASET MODEL` writes one.")
