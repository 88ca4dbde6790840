"""The command `dit-accel`: generation, comparison and reports from a shell.

Exit codes: 0 done, 1 bad input, 2 wrong usage, 3 something asked for was unavailable.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dit_accel.files import ended_by_sigterm

from . import bench, calibrate, compare, demo, distill, evaluate, generate, hunt, listing, plan
from .errors import set_debug

app = typer.Typer(
    name="dit-accel",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Faster attention for Hugging Face diffusers transformers.",
    epilog="Exit codes: 0 done, 1 bad input, 2 wrong usage, 3 something asked for was unavailable.",
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    set_debug(debug)


for module in (generate, compare, plan, calibrate, distill, bench, hunt, listing, evaluate, demo):
    module.register(app)


def main() -> None:
    """Entry point of the console script."""
    with ended_by_sigterm():
        app(prog_name="dit-accel")
