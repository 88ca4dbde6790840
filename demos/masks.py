"""The tab that explores masks: a pattern on a grid, its blocks in each order, and what that would save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch

from dit_accel import patterns
from dit_accel.masks.block_picture import draw_blocks, draw_neighbourhood
from dit_accel.masks.estimate import MaskEstimate, estimate_mask
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern
from dit_accel.patterns.base import StaticPattern
from dit_accel.recipe import files
from dit_accel.recipe.recipe import Recipe

from . import calibrations, inputs, knobs
from .exports import Export, recipe_in_python
from .sessions import Session
from .settings import Caps
from .tab import CLASSES, LOOK_UPS, Studio, Tab, export_area, told
from .worker import IMPORTS

if TYPE_CHECKING:
    from PIL.Image import Image

ORDERS = ("raster", "tile", "auto")
BLOCKS = ("128x64", "128x128", "64x64", "64x32", "32x32")
SAMPLED, SAMPLED_OF_LONG, LONG = 256, 24, 20_000  # query blocks; tokens from which fewer are looked at
START = {  # of parameters that have no default
    "Clear": {"radius": 16},
    "Neighborhood": {"window": (24, 24), "stride": (4, 4)},
    "SlidingTile": {"window": (1, 3, 3), "tile": (1, 8, 8)},
    "InwardWindow": {"half_window": (12, 12)},
    "SpatialHead": {"keep": 0.5},  # of a picture: text alone takes a quarter
    "TemporalHead": {"keep": 0.5},
    "ByNoise": {"levels": {0.8: patterns.Clear(24), 0: patterns.Clear(8)}},
}
START_OF_VIDEO = {
    "ByNoise": {"levels": {0.9: patterns.Dense(), 0.6: patterns.Radial(0.95), 0: patterns.Radial(0.2)}},
    "Neighborhood": {"window": (5, 20, 20), "stride": (1, 4, 4)},
    "SlidingTile": {"window": (3, 3, 3), "tile": (6, 8, 8)},
    "SpatialHead": {},
    "TemporalHead": {},
}


def pattern_names() -> list[str]:
    """Patterns of the library with a mask that is known from the grid alone, and something to begin with."""
    found = (getattr(patterns, name) for name in patterns.__all__)
    static = [cls for cls in found if dataclasses.is_dataclass(cls) and issubclass(cls, StaticPattern)]
    names = [cls.__name__ for cls in static if cls.__name__ in START or not _needs_values(cls)]
    return [*(name for name in names if name != "Dense"), "Dense"]


def _needs_values(cls: type[Pattern]) -> bool:
    """Whether a pattern has parameters without a default."""
    none = dataclasses.MISSING
    return any(f.default is none and f.default_factory is none for f in dataclasses.fields(cls))


def geometries() -> dict[str, tuple[str, knobs.Grid, int]]:
    """Name, grid and text tokens of published models at their usual size, by what the page calls them."""
    from dit_accel.planning.model_config import all_published

    from .examples import grid_of

    found = {}
    for name, config in all_published().items():
        grid, (frames, height, width) = grid_of(config, config.size), config.size
        label = f"{name}  {width}×{height}" + (f"×{frames}" if frames > 1 else "")
        found[label] = (name, grid, config.layout(grid).text_len)
    return found


def build(studio: Studio) -> None:
    """Adds the tab's components and events."""
    known = geometries()
    first = next((label for label in known if "flux" in label), next(iter(known)))
    _, grid, text_len = known[first]
    start = _start("Clear", grid)
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
                _written(start), label="All parameters", lines=1, max_lines=3, elem_id="parameters"
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


def _start(name: str, grid: knobs.Grid) -> Pattern:
    """A pattern with parameters to begin with, on a grid."""
    given = {**START, **(START_OF_VIDEO if grid[0] > 1 else {})}.get(name, {})
    fitted = {
        key: tuple(min(n, side) for n, side in zip(value, grid[-len(value) :], strict=True))
        if isinstance(value, tuple)
        else value
        for key, value in given.items()
    }
    return getattr(patterns, name)(**fitted)


def _noise_slider(pattern: Pattern) -> dict[str, Any]:
    """Options of the slider of noise levels, which patterns by noise alone have."""
    return {
        "minimum": 0, "maximum": 1, "value": 1, "step": 0.01, "label": "Noise level",
        "info": "1 at the start of a run, 0 at its end", "visible": pattern.by_noise,
    }  # fmt: skip


def _written(pattern: Pattern) -> str:
    """Its parameters as the text that `_read` takes."""
    data = Recipe(pattern).to_dict()["attention"]
    return ", ".join(f"{key}: {value}" for key, value in data.items() if key != "pattern").replace("'", "")


def _read(name: Any, parameters: Any, caps: Caps) -> Any:
    """The pattern of a name and its parameters, `radius: 16, downsample: 2`."""
    if name not in pattern_names():
        raise ValueError(f"Pattern must be one of {', '.join(pattern_names())}.")
    text = inputs.text("Parameters", parameters, caps.recipe).strip().removeprefix("{").removesuffix("}")
    values = files.parse("{" + text + "}") if text else {}
    return knobs.first_pattern(Recipe.from_dict({"attention": {**values, "pattern": name}}))


def _grid(frames: Any, rows: Any, columns: Any, caps: Caps) -> knobs.Grid:
    sides = (("Frames", frames), ("Rows", rows), ("Columns", columns))
    frames, rows, columns = (inputs.whole(name, value, 1, 4096) for name, value in sides)
    if frames * rows * columns > caps.tokens:
        raise ValueError(f"This page takes up to {caps.tokens} tokens; take a smaller grid.")
    return frames, rows, columns


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
    grid = _grid(frames, rows, columns, studio.settings.caps)
    pattern = _start(name, grid)
    sliders = [*knobs.sliders(pattern, grid), _noise_slider(pattern)]
    return [*(gr.Slider(**look) for look in sliders), _written(pattern)]


def turned(
    studio: Studio, name: Any, parameters: Any, frames: Any, rows: Any, columns: Any, *values: Any
) -> str:
    """The parameters with the sliders where they are now."""
    caps = studio.settings.caps
    pattern = _read(name, parameters, caps)
    return _written(knobs.turned(pattern, _grid(frames, rows, columns, caps), values))


# -- drawing -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is to be drawn: a pattern, by noise what it is at one level."""

    whole: StaticPattern
    pattern: StaticPattern
    noise: float | None  # None where it is the same at all levels
    layout: TokenLayout
    blocks: tuple[int, int]

    @classmethod
    def checked(cls, caps: Caps, name, parameters, frames, rows, columns, text, blocks, noise=1.0) -> _Asked:
        whole = _read(name, parameters, caps)
        level = inputs.number("Noise level", noise, 0, 1) if whole.by_noise else None
        pattern = whole.at_step(0, sigma=level) if whole.by_noise else whole
        layout = TokenLayout(_grid(frames, rows, columns, caps), text_len=inputs.whole("Text", text, 0, 8192))
        if blocks not in BLOCKS:
            raise ValueError(f"Block must be one of {', '.join(BLOCKS)}.")
        if not isinstance(pattern, StaticPattern):
            raise ValueError(f"{type(pattern).__name__} chooses by content, which is not known here.")
        if pattern.pooled_keys(layout):
            raise ValueError("Pooled keys are not drawn here; leave `downsample` out.")
        return cls(whole, pattern, level, layout, tuple(map(int, blocks.split("x"))))

    @property
    def sampled(self) -> int:
        """Query blocks that block densities are counted on."""
        return SAMPLED_OF_LONG if self.layout.seq_len > LONG else SAMPLED


@lru_cache(maxsize=8)  # for the figures that follow a drawing, and for other visitors
def _estimates(asked: _Asked) -> dict[str, MaskEstimate]:
    """By the name of the order, which all noise levels of a pattern share; one object for equal orders."""
    found: dict[str, MaskEstimate] = {}
    for name in ORDERS:
        order = asked.whole.token_order(asked.layout, asked.blocks, name)
        same = next((one for one in found.values() if torch.equal(one.order, order)), None)
        found[name] = same or estimate_mask(asked.pattern, asked.layout, asked.blocks, order, asked.sampled)
    return found


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
    asked = _Asked.checked(caps, pattern, parameters, frames, rows, columns, text, blocks, noise)
    estimates, pictures = studio.drawing.call(_drawn, asked)
    session: Session = studio.sessions.of(browser.session_hash)
    session.drawings += 1
    with session.result() as folder:
        paths = []
        for name, picture in zip(("neighbourhood", *ORDERS), pictures, strict=True):
            paths.append(folder / f"{name}.png")
            picture.save(paths[-1])
    return [*map(str, paths), _summary(asked, estimates), *_export(studio, asked).values]


def _drawn(asked: _Asked) -> tuple[dict[str, MaskEstimate], list[Image]]:
    """What is known of each order; pictures of a neighbourhood and of the blocks in each order."""
    estimates = _estimates(asked)
    blocks = {
        one: draw_blocks(asked.pattern, asked.layout, asked.blocks, one.order)
        for one in set(estimates.values())
    }
    near = draw_neighbourhood(asked.pattern, asked.layout)
    return estimates, [near, *(blocks[one] for one in estimates.values())]


def _summary(asked: _Asked, estimates: dict[str, MaskEstimate]) -> dict[str, Any]:
    best = min(one.block_density for one in estimates.values())
    any_one = next(iter(estimates.values()))
    note = ""
    if any_one.sampled < any_one.rows:
        note = f"Shares of blocks are estimated from {any_one.sampled} of {any_one.rows} query blocks."
    here = f"{type(asked.pattern).__name__} {_written(asked.pattern)}".strip()
    return {
        "tokens": f"{asked.layout.seq_len:,}",
        "level": "" if asked.noise is None else here,
        "density": any_one.density,
        "density_text": f"{any_one.density:.1%}",
        "rows": [
            {
                "order": name,
                "block_density": one.block_density,
                "text": f"{one.block_density:.1%}",
                "mark": "best" if one.block_density == best else "",
            }
            for name, one in estimates.items()
        ],
        "note": note,
    }


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
    answer = _predicted(studio, model, *given)
    return answer if session.drawings == drawings else gr.skip()


def _predicted(studio: Studio, model: Any, *given: Any) -> dict[str, Any]:
    from dit_accel.planning.model_config import all_published
    from dit_accel.planning.uniform import uniform_speedups

    asked = _Asked.checked(studio.settings.caps, *given)
    known = geometries()
    if model not in known:
        raise ValueError("Choose one of the listed geometries.")
    estimates, grid = _estimates(asked), asked.layout.grid
    answer = _summary(asked, estimates)
    settings, best = studio.settings, estimates["auto"]
    with studio.worker.unless_busy() as free:  # counting FLOPs hooks every module, those of a run too
        if not free:
            return {**answer, "note": f"{answer['note']} Speed-ups are counted when no run is under way."}
        try:
            with IMPORTS:
                found = uniform_speedups(
                    asked.pattern,
                    all_published()[known[model][0]],
                    grid,
                    best.density,
                    best.block_density,
                    settings.device.type,
                    settings.dtype_name,
                )
        except ValueError as error:  # a grid that this model does not take
            return {**answer, "note": f"{answer['note']} No speed-up: {error}".strip()}
    answer |= {name: f"{found[name].ideal:.2f}×" for name in ("attention", "step")}
    if found["step"].predicted is not None:
        answer["predicted"] = f"{found['step'].predicted:.2f}×"
    return answer


def _export(studio: Studio, asked: _Asked) -> Export:
    """Python that draws the same pictures, and the command that plans and draws the whole mask."""
    recipe = Recipe(asked.whole, block_size=asked.blocks)
    level = "" if asked.noise is None else f".at_step(0, sigma={asked.noise})"
    grid, (q, k) = asked.layout.grid, asked.blocks
    python = (
        "import dit_accel\nfrom dit_accel.masks.block_picture import draw_blocks, draw_neighbourhood\n"
        "from dit_accel.masks.estimate import estimate_mask\n\n"
        f"recipe = {recipe_in_python(recipe)}\n"
        f"pattern = recipe.attention{level}\n"
        f"layout = dit_accel.TokenLayout({grid}, text_len={asked.layout.text_len})\n"
        'draw_neighbourhood(pattern, layout).save("neighbourhood.png")\n'
        f"for name in {ORDERS}:\n"
        f"    order = recipe.attention.token_order(layout, ({q}, {k}), name)\n"
        f"    mask = estimate_mask(pattern, layout, ({q}, {k}), order, {asked.sampled})\n"
        "    print(name, mask.density, mask.block_density)\n"
        f'    draw_blocks(pattern, layout, ({q}, {k}), order).save(f"{{name}}.png")\n'
    )
    command = f"cat > draw.py <<'END_OF_PYTHON'\n{python}END_OF_PYTHON\npython draw.py\n"
    return Export(recipe.to_yaml(), python, command)


TAB = Tab("Masks", build)
