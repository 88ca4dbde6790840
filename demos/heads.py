"""The tab of attention heads: what a hunt measured of each, and what perturbing one does to a picture."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.guidance.hunter import SCHEMA
from dit_accel.guidance.perturbation import HeadPerturbation
from dit_accel.json_files import read_json
from dit_accel.patterns import Dense
from dit_accel.pipelines import tiny
from dit_accel.recipe.recipe import Recipe

from . import examples, exports, inputs, players, runs
from .settings import Settings
from .tab import CLASSES, LOOK_UPS, MODEL_QUEUE, Studio, Tab, export_area, told
from .worker import IMPORTS

PERTURBED = "perturbed"
KINDS = ("soft_pag", "uniform", "seg")
LARGEST_FILE = 2**24  # bytes
NO_HUNT = "no search: the heads of "

_MAP = """
<div class="heads">
  {{#if value.rows}}
  <table><caption>{{value.caption}}</caption>
  <thead><tr><th></th>{{#each value.heads}}<th>{{this}}</th>{{/each}}</tr></thead>
  <tbody>{{#each value.rows}}<tr><th>{{this.name}}</th>
    {{#each this.cells}}<td><button type="button" class="head {{this.mark}}"
      style="background:{{this.colour}}"
      data-layer="{{this.layer}}" data-head="{{this.head}}" title="{{this.title}}"
      aria-label="{{this.title}}"></button></td>{{/each}}
  </tr>{{/each}}</tbody></table>
  {{/if}}
</div>
"""
_CLICKS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button.head');
  if (!button) return;
  element.querySelectorAll('button.head').forEach(one => one.classList.toggle('picked', one === button));
  trigger('click', {layer: Number(button.dataset.layer), head: Number(button.dataset.head)});
});
"""


@dataclass(frozen=True)
class Hunt:
    """What a file says: layers, heads of each, effects by head where measured, and the chosen heads."""

    model: str
    caption: str
    layers: tuple[str, ...]
    heads: int
    effects: dict[tuple[int, int], float]
    chosen: frozenset[tuple[int, int]]


def hunts(settings: Settings) -> dict[str, Path | None]:
    """Logs and found sets of searches in the results' folder, by what the page calls them; None: no file."""
    found: dict[str, Path | None] = {}
    for path in sorted(settings.results.rglob("*.json")):
        if "hunt" in str(path.relative_to(settings.results)) and path.stat().st_size < LARGEST_FILE:
            model = _model_of(path, settings)
            if model in settings.models:
                found[str(path.relative_to(settings.results))] = path
    for name in settings.models:
        if name in tiny.NAMES:
            found[f"{NO_HUNT}{name}"] = None
    return dict(sorted(found.items(), key=lambda pair: (pair[1] is None, not _is_log(pair[1]), pair[0])))


def _is_log(path: Path | None) -> bool:
    data = None if path is None else read_json(path)
    return isinstance(data, dict) and data.get("schema") == SCHEMA


def _model_of(path: Path, settings: Settings) -> str | None:
    """The model that a search was made with: as its log says, else by the file's name."""
    data = read_json(path)
    if not isinstance(data, dict) or not ("heads" in data or data.get("schema") == SCHEMA):
        return None
    named = (data.get("settings") or {}).get("model") if isinstance(data.get("settings"), dict) else None
    if named in settings.models:
        return named
    fitting = [name for name in settings.models if re.search(rf"\b{re.escape(name)}\b", str(path))]
    return max(fitting, key=len, default=None)


def _model_named(known: dict[str, Path | None], label: str, settings: Settings) -> str:
    """The model of a label; the first of all where there is no search."""
    path = known.get(label)
    if path is None:
        name = label.removeprefix(NO_HUNT)
        return name if name in settings.models else settings.models[0]
    return _model_of(path, settings) or settings.models[0]


def read(settings: Settings, label: Any) -> Hunt:
    """The hunt of a label of `hunts`; no other file is opened.

    Raises:
        ValueError: another label, or a file that is no result of `dit-accel hunt`.
    """
    known = hunts(settings)
    if label not in known:
        raise ValueError("Choose one of the listed searches.")
    path, model = known[label], _model_named(known, label, settings)
    layers, heads = _layers(model)
    if path is None:
        return Hunt(model, "every head of every layer; none was searched", layers, heads, {}, frozenset())
    data = read_json(path, "a result of `dit-accel hunt`")
    if data.get("schema") != SCHEMA:
        chosen = HeadPerturbation.from_dict(data).layers(list(layers), heads)
        places = {name: index for index, name in enumerate(layers)}
        pairs = {(places[name], head) for name, weights in chosen.items() for head in weights}
        return Hunt(model, "framed: the heads that a search chose", layers, heads, {}, frozenset(pairs))
    try:
        first, objective = data["rounds"][0], data["objective"]
        effects = {(layer, head): row[objective] - data["without"] for layer, head, row in first["means"]}
        chosen = frozenset(map(tuple, data["best"]))
        layers, heads = tuple(data["layers"]), data["heads_per_layer"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{label} is no log of `dit-accel hunt`: {error!r:.80}") from None
    caption = f"change of {objective} from {data['without']:.3f} by each head alone; framed: chosen"
    return Hunt(model, caption, layers, heads, effects, chosen)


@cache
def _layers(model: str) -> tuple[tuple[str, ...], int]:
    """Names of the layers of a bundled model and their number of heads, from its configuration."""
    from dit_accel.planning.model_config import of_model

    config = of_model(model)
    with IMPORTS:
        transformer: Any = config.transformer()
    names = [name for name in config.description.layers(transformer) if not name.endswith(".attn2")]
    return tuple(names), config.description.heads(transformer)[0]


def build(studio: Studio) -> None:
    """Adds the tab's components and events."""
    settings = studio.settings
    known = hunts(settings)
    labels = list(known) or ["no search"]
    first = labels[0]
    start = _start(_model_named(known, first, settings))
    with gr.Row(equal_height=False, elem_classes="workbench"):
        with gr.Column(scale=2, min_width=330, elem_classes="controls"):
            hunt = gr.Dropdown(labels, value=first, label="Search", filterable=False, elem_id="hunt")
            heat = gr.HTML(value={}, html_template=_MAP, js_on_load=_CLICKS, elem_id="heat")
            with gr.Row():
                layer = gr.Number(
                    0, label="Layer", precision=0, minimum=0, min_width=80, elem_id="head-layer"
                )
                head = gr.Number(0, label="Head", precision=0, minimum=0, min_width=80, elem_id="head-head")
                kind = gr.Dropdown(list(KINDS), value=KINDS[0], label="Kind", filterable=False, min_width=150)
            strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", elem_id="strength")
            scale = gr.Slider(0, 12, 3, step=0.5, label="Guidance by it")
            prompt = gr.Textbox(
                start["prompt"], label="Prompt", lines=2, max_lines=4, max_length=settings.caps.prompt
            )
            with gr.Accordion("Size, steps and seed", open=False, elem_id="head-size"), gr.Row():
                width = gr.Number(start["width"], label="Width", precision=0, min_width=70)
                height = gr.Number(start["height"], label="Height", precision=0, min_width=70)
                frames = gr.Number(
                    start["frames"], label="Frames", precision=0, min_width=70, visible=start["video"]
                )
                steps = gr.Number(start["steps"], label="Steps", precision=0, min_width=70)
                seed = gr.Number(1, label="Seed", precision=0, min_width=70)
            with gr.Row(elem_classes="actions"):
                perturb = gr.Button("Perturb", variant="primary", scale=3, elem_id="perturb")
                cancel = gr.Button("Cancel", variant="stop", scale=1, min_width=90, elem_id="cancel-head")
        with gr.Column(scale=3, min_width=420, elem_classes="stage"):
            pair = gr.ImageSlider(
                label="Before on the left, perturbed on the right",
                type="filepath",
                interactive=False,
                height=512,
                max_height=512,
                elem_id="head-pair",
            )
            video = players.players(visible=False, elem_id="head-players")
            figures = players.figures_area(elem_id="head-figures")
            export = export_area()

    look_up = {"show_progress": "hidden", "concurrency_id": LOOK_UPS, "concurrency_limit": 2}
    of_class = {"show_progress": "hidden", "concurrency_id": CLASSES, "concurrency_limit": 1}
    work = {
        "concurrency_id": MODEL_QUEUE,
        "concurrency_limit": 1,
        "show_progress": "full",
        "show_progress_on": [pair, video],
    }
    given = [hunt, layer, head, kind, strength, scale, prompt, width, height, frames, steps, seed]
    results = [pair, video, figures, *export]

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return told(function, studio)

    about = [heat, prompt, width, height, frames, steps, pair, video]
    gr.on([hunt.change], bound(chosen), hunt, about, api_name="hunt", **of_class)
    gr.context.Context.root_block.load(bound(chosen), hunt, about, api_name="hunt_at_start", **of_class)
    picked = heat.click(bound(picked_head), None, [layer, head], api_name="head", **look_up).then(
        bound(perturb_head), given, results, api_name="perturb_clicked", **work
    )
    slid = strength.release(bound(perturb_head), given, results, api_name="perturb_stronger", **work)
    pressed = perturb.click(bound(perturb_head), given, results, api_name="perturb", **work)
    cancel.click(bound(runs.cancel), api_name="cancel_head", queue=False, cancels=[picked, slid, pressed])


def chosen(studio: Studio, label: Any) -> list[Any]:
    """The heat map of a search, and what its model starts with."""
    found = read(studio.settings, label)
    start = _start(found.model)
    video = start["video"]
    return [
        heat_map(found),
        start["prompt"],
        start["width"],
        start["height"],
        gr.Number(start["frames"], visible=video),
        start["steps"],
        gr.ImageSlider(visible=not video),
        gr.HTML(visible=video),
    ]


def _start(model: str) -> dict[str, Any]:
    """Prompt and size to begin with: small, for a head is looked at many times."""
    about = examples.defaults(model)
    info = tiny.INFO.get(model)
    frames, height, width = (about.frames, about.height, about.width) if info is None else info.native
    return {
        "prompt": examples.prompts(model)[0],
        "width": width,
        "height": height,
        "frames": frames if about.video else None,
        "steps": about.steps,
        "video": about.video,
    }


def heat_map(hunt: Hunt) -> dict[str, Any]:
    """The value of the map: rows of layers, a cell a head."""
    limit = max(map(abs, hunt.effects.values()), default=0.0) or 1.0
    rows = []
    for layer, name in enumerate(hunt.layers):
        cells = []
        for head in range(hunt.heads):
            effect = hunt.effects.get((layer, head))
            said = "not measured" if effect is None else f"{effect:+.4f}"
            cells.append(
                {
                    "layer": layer,
                    "head": head,
                    "colour": _colour(effect, limit),
                    "mark": "chosen" if (layer, head) in hunt.chosen else "",
                    "title": f"{name}, head {head}: {said}",
                }
            )
        rows.append({"name": name, "cells": cells})
    return {"caption": hunt.caption, "heads": list(range(hunt.heads)), "rows": rows}


def _colour(effect: float | None, limit: float) -> str:
    """Teal where a head helps, amber where it harms, grey where nothing was measured."""
    if effect is None:
        return "#e2e8f0"
    share = min(1.0, abs(effect) / limit)
    target = (13, 148, 136) if effect > 0 else (217, 119, 6)
    return "rgb({}, {}, {})".format(*(round(244 + (end - 244) * share) for end in target))


def picked_head(studio: Studio, event: gr.EventData) -> list[int]:
    """The head that was clicked."""
    data = event._data if isinstance(event._data, dict) else {}
    return [
        inputs.whole("Layer", data.get("layer"), 0, 10_000),
        inputs.whole("Head", data.get("head"), 0, 10_000),
    ]


def perturb_head(
    studio: Studio,
    hunt: Any,
    layer: Any,
    head: Any,
    kind: Any,
    strength: Any,
    scale: Any,
    prompt: Any,
    width: Any,
    height: Any,
    frames: Any,
    steps: Any,
    seed: Any,
    browser: gr.Request,
    progress: gr.Progress = gr.Progress(),  # noqa: B008, by which Gradio knows it
) -> list[Any]:
    """Without and with guidance by one perturbed head, from the same seed.

    Returns:
        files of a pair of pictures, or of videos, then figures, recipe, Python and command.
    """
    settings = studio.settings
    found = read(settings, hunt)
    layer = inputs.whole("Layer", layer, 0, len(found.layers) - 1)
    head = inputs.whole("Head", head, 0, found.heads - 1)
    if kind not in KINDS:
        raise ValueError(f"Kind must be one of {', '.join(KINDS)}.")
    perturbation = HeadPerturbation(
        [(layer, head)],
        kind=kind,
        strength=inputs.number("Strength", strength, 0, 1),
        scale=inputs.number("Guidance by it", scale, 0, 100),
    )
    recipe = Recipe(Dense(), guidance=perturbation)
    asked = inputs.request(settings, found.model, prompt, width, height, frames, steps, None, seed)
    session = studio.sessions.of(browser.session_hash)
    both = [(runs.DENSE, None), (PERTURBED, recipe)]
    request, shown = runs.run(studio, session, found.model, asked, both, progress)
    export = exports.of_run(settings, found.model, request, recipe, runs.FPS if shown[0].video else None)
    files = tuple(str(one.path) for one in shown)
    pictures = [None, players.sources(shown)] if shown[0].video else [files, []]
    return [*pictures, players.for_people(runs.figures(shown)), *export.values]


TAB = Tab("Heads", build)
