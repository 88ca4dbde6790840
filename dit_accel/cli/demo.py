"""`dit-accel demo`: a page in the browser that generates, compares and explores."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.optional import required

from . import options as opt
from .errors import reported
from .output import note

EXAMPLE = "Example: dit-accel demo --model tiny-flux --model black-forest-labs/FLUX.1-dev --device cuda"


@reported
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A bundled model, a folder or a hub id; repeat it for several. All bundled without.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Where it listens; 0.0.0.0: everywhere.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65_535, help="The first free one from 7860 without.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="A public address by Gradio.")] = False,
    auth: Annotated[
        list[str] | None, typer.Option("--auth", help="NAME:PASSWORD that visitors need; may be repeated.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--results", help="Folder of result files for the tabs Heads and Evaluate.")
    ] = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
) -> None:
    """Serve a page that generates, compares, explores masks and heads, and shows results.

    Visitors choose among the models given here and no others; loading one unloads the one before. Files are
    in a temporary folder, which is deleted at the end.
    """
    required("gradio", "the demo", "demo")
    pairs = [_pair(text) for text in auth or []]
    target = opt.pick_device(device)
    from dit_accel.demos.app import served
    from dit_accel.demos.settings import Settings

    if results is not None and not results.is_dir():
        raise ValueError(f"`--results` must be a folder, got {results}")
    chosen = {"models": tuple(dict.fromkeys(model))} if model else {}
    chosen |= {} if results is None else {"results": results}
    for name in model or ():
        _check_model(name)
    settings = Settings(target, opt.pick_dtype(dtype, target), **chosen)
    with served(settings, host, port, share, pairs) as (_, studio):
        note(f"{', '.join(studio.settings.models)} on {target}; Ctrl-C stops")
        threading.Event().wait()


def _pair(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise ValueError("`--auth` must be NAME:PASSWORD")
    return name, password


def _check_model(name: str) -> None:
    """Refuses, before anything is served, what can be no model."""
    from dit_accel.pipelines import tiny

    if name in tiny.NAMES or (Path(name) / "model_index.json").is_file():
        return
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ValueError(
            f"`--model {name}` is neither a bundled model ({', '.join(tiny.NAMES)}), nor a pipeline folder, "
            "nor a hub id"
        )


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog=EXAMPLE)(demo)
