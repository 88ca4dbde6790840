"""The tab that explores masks: a pattern on a grid, its blocks in each order, and what that would save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from dit_accel.patterns import Pattern

from . import calibrations, knobs
from .mask_choices import checked_grid, geometries, pattern_names, read, starting_pattern, written
from .mask_drawings import BLOCKS, ORDERS, Asked, drawn, export_of, predicted, summary_of
from .sessions import Session
from .tab import CLASSES, LOOK_UPS, Studio, Tab, export_area, told


def build(studio: Studio) -> None:
    """Adds the tab's components and events."""
    known = geometries()
    first = next((label for label in known if "flux" in label), next(iter(known)))
    _, grid, text_len = known[first]
    start = starting_pattern("Clear", grid)
    with gr.Row(equal_height=False, elem_classes="workbench"):
        with gr.Column(scale=2, min_width=330, elem_classes="controls"):
            model = gr.Dropdown(list(known), value=first, label="Geometry of", filterable=False)
            pattern = gr.Dropdown(
                pattern_names(), value="Clear", label="Pattern", filterable=False, elem_id="pattern"
            )
            sliders = [
                gr.Slider(**look, interactive=True, elem_id=f"mask-knob-{number}")
                for number, look in enumerate(knobs.sliders(start, grid))
            ]
            noise = gr.Slider(**_noise_slider(start), interactive=True, elem_id="noise")
            parameters = gr.Textbox(
                written(start), label="All parameters", lines=1, max_lines=3, elem_id="parameters"
            )
            with gr.Row():
                frames = gr.Number(grid[0], label="Frames", precision=0, min_width=90)
                rows = gr.Number(grid[1], label="Rows", precision=0, min_width=90)
                columns = gr.Number(grid[2], label="Columns", precision=0, min_width=90)
                text = gr.Number(text_len, label="Text", precision=0, min_width=90)
            blocks = gr.Dropdown(
                list(BLOCKS), value=BLOCKS[0], label="Block, queries x keys", filterable=False
            )
            with gr.Accordion("Which block size, which order?", open=False):
                gr.Markdown(
                    "A kernel computes whole blocks, so what counts is the share of **blocks**, not pairs. "
                    "The order of the tokens decides how few blocks a pattern needs; `auto` takes the "
                    "best that it finds. Sizes here are in **tokens**: 1024×1024 pixels of FLUX are 64×64."
                )
        with gr.Column(scale=3, min_width=420, elem_classes="stage"):
            summary = gr.HTML(value={}, html_template=_SUMMARY, js_on_load="", elem_id="mask-summary")
            with gr.Row(elem_classes="orders"):
                near = gr.Image(label="What one token attends to", **_picture(), elem_id="near")
                views = [gr.Image(label=f"Blocks, {name} order", **_picture()) for name in ORDERS]
            export = export_area()

    given = [pattern, parameters, frames, rows, columns, text, blocks, noise]
    shown = [near, *views, summary, *export]
    # of what is asked for meanwhile the last is drawn
    look_up = {
        "show_progress": "minimal", "concurrency_id": LOOK_UPS, "concurrency_limit": 2,
        "trigger_mode": "always_last",
    }  # fmt: skip

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return told(function, studio)

    # who begins a change writes the parameters' text, whose change redraws
    quiet = {**look_up, "show_progress": "hidden"}
    counted = {**quiet, "concurrency_id": CLASSES, "concurrency_limit": 1}
    model.input(
        bound(geometry_chosen), [model, pattern], [frames, rows, columns, text, *sliders, noise, parameters],
        api_name="geometry", **quiet,
    ).then(bound(draw), given, shown, api_name="mask_of_geometry", **look_up).then(
        bound(predict), [model, *given], summary, api_name="speed_of_geometry", **counted
    )  # fmt: skip
    pattern.input(
        bound(pattern_chosen), [pattern, frames, rows, columns], [*sliders, noise, parameters],
        api_name="pattern", **quiet,
    ).then(bound(draw), given, shown, api_name="mask_of_pattern", **look_up).then(
        bound(predict), [model, *given], summary, api_name="speed_of_pattern", **counted
    )  # fmt: skip
    for number, slider in enumerate(sliders):
        slider.input(
            bound(turned), [pattern, parameters, frames, rows, columns, *sliders], parameters,
            api_name=f"mask_knob_{number}", **quiet,
        ).then(bound(draw), given, shown, api_name=f"mask_of_knob_{number}", **look_up).then(
            bound(predict), [model, *given], summary, api_name=f"speed_of_knob_{number}", **counted
        )  # fmt: skip
    gr.on(
        [parameters.submit, noise.input, blocks.input]
        + [one.submit for one in (frames, rows, columns, text)],
        bound(draw), given, shown, api_name="mask", **look_up,
    ).then(bound(predict), [model, *given], summary, api_name="speed", **counted)  # fmt: skip
    gr.context.Context.root_block.load(bound(draw), given, shown, api_name="mask_at_start", **quiet)
    calibrations.build(studio)


def _picture() -> dict[str, Any]:
    return {
        "type": "filepath", "interactive": False, "height": 300, "min_width": 290, "format": "png",
        "buttons": ["download", "fullscreen"],
    }  # fmt: skip


_SUMMARY = """
<div class="figures">
  {{#if value.rows}}
  <section><dl>
    <div><dt>tokens</dt><dd>{{value.tokens}}</dd></div>
    {{#if value.level}}<div><dt>at this noise</dt><dd>{{value.level}}</dd></div>{{/if}}
    <div><dt>density</dt><dd>{{value.density_text}}</dd></div>
    {{#each value.rows}}
    <div class="{{this.mark}}"><dt>blocks, {{this.order}}</dt><dd>{{this.text}}</dd></div>
    {{/each}}
    {{#if value.attention}}<div class="best"><dt>attention at best</dt><dd>{{value.attention}}</dd></div>
    <div class="best"><dt>step at best</dt><dd>{{value.step}}</dd></div>{{/if}}
    {{#if value.predicted}}
    <div class="best"><dt>step, predicted here</dt><dd>{{value.predicted}}</dd></div>
    {{/if}}
  </dl>
  {{#if value.note}}<p class="note">{{value.note}}</p>{{/if}}</section>
  {{else}}<p class="empty">Move a slider, or press Enter in a field.</p>{{/if}}
</div>
"""


# -- patterns and their parameters ---------------------------------------------------------------------------


def _noise_slider(pattern: Pattern) -> dict[str, Any]:
    """Options of the slider of noise levels, which patterns by noise alone have."""
    return {
        "minimum": 0, "maximum": 1, "value": 1, "step": 0.01, "label": "Noise level",
        "info": "1 at the start of a run, 0 at its end", "visible": pattern.by_noise,
    }  # fmt: skip


def geometry_chosen(studio: Studio, model: Any, name: Any) -> list[Any]:
    """Grid and parameters to begin with."""
    known = geometries()
    if model not in known:
        raise ValueError("Choose one of the listed geometries.")
    _, grid, text_len = known[model]
    return [*grid, text_len, *pattern_chosen(studio, name, *grid)]


def pattern_chosen(studio: Studio, name: Any, frames: Any, rows: Any, columns: Any) -> list[Any]:
    """Sliders and parameters to begin with."""
    if name not in pattern_names():
        raise ValueError(f"Pattern must be one of {', '.join(pattern_names())}.")
    grid = checked_grid(frames, rows, columns, studio.settings.caps)
    pattern = starting_pattern(name, grid)
    sliders = [*knobs.sliders(pattern, grid), _noise_slider(pattern)]
    return [*(gr.Slider(**look) for look in sliders), written(pattern)]


def turned(
    studio: Studio, name: Any, parameters: Any, frames: Any, rows: Any, columns: Any, *values: Any
) -> str:
    """The parameters with the sliders where they are now."""
    caps = studio.settings.caps
    pattern = read(name, parameters, caps)
    return written(knobs.turned(pattern, checked_grid(frames, rows, columns, caps), values))


# -- drawing -------------------------------------------------------------------------------------------------


def draw(
    studio: Studio,
    pattern: Any,
    parameters: Any,
    frames: Any,
    rows: Any,
    columns: Any,
    text: Any,
    blocks: Any,
    noise: Any,
    browser: gr.Request,
) -> list[Any]:
    """A pattern on a grid, at a noise level if it is another one at other levels.

    Returns:
        pictures of one token's neighbourhood and of the blocks in raster, tile and the best order; figures;
        then recipe, Python and command.
    """
    caps = studio.settings.caps
    asked = Asked.checked(caps, pattern, parameters, frames, rows, columns, text, blocks, noise)
    estimates, pictures = studio.drawing.call(drawn, asked)
    session: Session = studio.sessions.of(browser.session_hash)
    session.drawings += 1
    with session.result() as folder:
        paths = []
        for name, picture in zip(("neighbourhood", *ORDERS), pictures, strict=True):
            paths.append(folder / f"{name}.png")
            picture.save(paths[-1])
    return [*map(str, paths), summary_of(asked, estimates), *export_of(asked).values]


def predict(
    studio: Studio,
    model: Any,
    pattern: Any,
    parameters: Any,
    frames: Any,
    rows: Any,
    columns: Any,
    text: Any,
    blocks: Any,
    noise: Any,
    browser: gr.Request,
) -> Any:
    """The figures with the speed-ups that the chosen model would have on this grid.

    Nothing, where something else was drawn meanwhile: its figures are there.
    """
    session = studio.sessions.of(browser.session_hash)
    drawings = session.drawings
    given = (pattern, parameters, frames, rows, columns, text, blocks, noise)
    answer = predicted(studio, model, *given)
    return answer if session.drawings == drawings else gr.skip()


TAB = Tab("Masks", build)
