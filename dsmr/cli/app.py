"""The `dsmr` program, put together of its commands.

Each command only reads its arguments, calls the function that does the work, and prints what it returns. What the user
can mend ends in one sentence on stderr and exit code 1; wrong usage in 2; a signal in 128 + its number. `DSMR_DEBUG=1`
shows the traceback instead.
"""

import typer

from dsmr.cli.budget import budget
from dsmr.cli.demo import demo
from dsmr.cli.evaluate import evaluate
from dsmr.cli.experiments import group as experiments
from dsmr.cli.export import export
from dsmr.cli.generate import generate
from dsmr.cli.options import HELP
from dsmr.cli.pack import pack
from dsmr.cli.play import play
from dsmr.cli.prepare import group
from dsmr.cli.profile import profile
from dsmr.cli.render import render
from dsmr.cli.train import train

app = typer.Typer(
    name="dsmr",
    help="Piano models that read whole pieces and play on for ever in bounded memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
app.add_typer(group, name="prepare")
app.command()(pack)
app.command()(train)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(play)
app.command()(render)
app.command()(export)
app.command()(budget)
app.command()(profile)
app.command()(demo)
app.add_typer(experiments, name="experiments")
