"""What calibrations chose, below the masks: a picture of layers and heads, coloured by pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel import Calibration
from dit_accel.calibration.picture import draw_choices

from .sessions import Session
from .settings import Settings
from .tab import LOOK_UPS, Studio, told

LARGEST_FILE = 2**28  # bytes


def calibrations(settings: Settings) -> dict[str, Path]:
    """Files of calibrations in the results' folder, by what the page calls them."""
    found = {}
    for path in sorted(settings.results.rglob("*.safetensors")):
        if path.stat().st_size < LARGEST_FILE:
            try:
                Calibration.load(path)
            except ValueError:  # of something else
                continue
            found[str(path.relative_to(settings.results))] = path
    return found


def build(studio: Studio) -> None:
    """Adds components and events, if there is a calibration in the results' folder."""
    known = list(calibrations(studio.settings))
    if not known:
        return
    with gr.Accordion("What a calibration chose", open=False, elem_id="calibrations"):
        which = gr.Dropdown(known, value=known[0], label="Calibration", filterable=False)
        said = gr.Markdown()
        picture = gr.Image(
            label="Layers downwards, heads to the right", type="filepath", interactive=False, format="png",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
    options = {"concurrency_id": LOOK_UPS, "concurrency_limit": 2, "show_progress": "minimal"}
    which.input(told(draw, studio), which, [picture, said], api_name="calibration", **options)
    gr.context.Context.root_block.load(
        told(draw, studio), which, [picture, said], api_name="calibration_at_start", **options
    )


def draw(studio: Studio, label: Any, browser: gr.Request) -> tuple[str, str]:
    """The picture of a calibration, and how many heads have what."""
    known = calibrations(studio.settings)
    if label not in known:
        raise ValueError("Choose one of the listed calibrations.")
    found = Calibration.load(known[label])
    session: Session = studio.sessions.of(browser.session_hash)
    with session.result() as folder:
        path = folder / "calibration.png"
        draw_choices(found).save(path)
    total = sum(found.counts().values())
    kinds = ", ".join(f"{n} {kind}" for kind, n in found.counts().items())
    return str(path), (
        f"{found.family}, grid {'×'.join(map(str, found.grid))}, {found.steps} steps, density "
        f"{found.density:g}. Of {total} choices: {kinds}. A white corner is a tail."
    )
