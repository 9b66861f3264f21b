"""`sanctl config`: write, list, show and check configuration files."""

import typer

from sanctl.cli.config.check import check
from sanctl.cli.config.list_presets import list_presets
from sanctl.cli.config.new import new
from sanctl.cli.config.show import show

app = typer.Typer(help="Write, list, show and check configuration files.", no_args_is_help=True)
app.command("new")(new)
app.command("list")(list_presets)
app.command("show")(show)
app.command("check")(check)
