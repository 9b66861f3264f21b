"""`sanctl dataset`: from images in folders to what training reads."""

import typer

from sanctl.cli.dataset.check import check
from sanctl.cli.dataset.index import index
from sanctl.cli.dataset.pack import pack
from sanctl.cli.dataset.sample import sample
from sanctl.cli.dataset.split import split
from sanctl.cli.dataset.stats import stats

app = typer.Typer(help="Index, split, pack and check datasets.", no_args_is_help=True)
app.command("index")(index)
app.command("split")(split)
app.command("pack")(pack)
app.command("sample")(sample)
app.command("stats")(stats)
app.command("check")(check)
