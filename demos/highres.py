"""The tab of high resolution: a picture above the size a model was trained for, beside its native one."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from dit_accel.highres import METHODS, presets
from dit_accel.pipelines import tiny

from . import examples, exports, inputs, runs
from .tab import LOOK_UPS, MODEL_QUEUE, Studio, Tab, export_area, told

MOST_TIMES = 4  # the native sides
NAMES = [name for name in METHODS if name != "windows"]  # which is for longer videos
NO_PRESET = "none"
NOTE = "Left the native size, right the same seed by the method. Videos: `dit-accel generate --highres`."


def models(studio: Studio) -> list[str]:
    """Those of the demo that make pictures and whose native size is known."""
    found = [name for name in studio.settings.models if name in tiny.NAMES and not tiny.INFO[name].video]
    return found or list(studio.settings.models[:1])


def build(studio: Studio) -> None:
    """Adds the tab's components and events."""
    known, caps = models(studio), studio.settings.caps
    about = examples.defaults(known[0])
    with gr.Row(equal_height=False, elem_classes="workbench"):
        with gr.Column(scale=2, min_width=330, elem_classes="controls"):
            model = gr.Dropdown(known, value=known[0], label="Model", filterable=False)
            prompt = gr.Textbox(
                examples.prompts(known[0])[0], label="Prompt", lines=2, max_lines=4, max_length=caps.prompt
            )
            preset = gr.Dropdown(
                _presets(known[0]), value=NO_PRESET, label="Preset, as published", filterable=False
            )
            method = gr.Dropdown(NAMES, value="swim", label="Method", filterable=False)
            times = gr.Slider(2, MOST_TIMES, 2, step=1, label="Times the native sides")
            strength = gr.Slider(0.1, 1, 0.7, step=0.05, label="Strength: share of the steps above native")
            with gr.Row():
                steps = gr.Number(about.steps, label="Steps", precision=0, minimum=0, min_width=80)
                guidance = gr.Number(about.guidance, label="Guidance", minimum=0, min_width=80)
                seed = gr.Number(1, label="Seed", precision=0, minimum=0, min_width=80)
            with gr.Row(elem_classes="actions"):
                start = gr.Button("Generate", variant="primary", scale=3, elem_id="enlarge")
                cancel = gr.Button("Cancel", variant="stop", scale=1, min_width=90)
        with gr.Column(scale=3, min_width=420, elem_classes="stage"):
            pair = gr.ImageSlider(
                label="Native size, enlarged, on the left",
                type="filepath",
                interactive=False,
                max_height=512,
                height=512,
                elem_id="enlarged",
            )
            note = gr.Markdown(NOTE, elem_classes="notes", sanitize_html=True)
            export = export_area()

    given = [model, prompt, method, times, strength, steps, guidance, seed]
    work = {"concurrency_id": MODEL_QUEUE, "concurrency_limit": 1, "show_progress_on": [pair]}

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return told(function, studio)

    look_up = {"show_progress": "hidden", "concurrency_id": LOOK_UPS, "concurrency_limit": 2}
    changed = [prompt, steps, guidance, preset]
    model.change(bound(model_changed), model, changed, api_name="highres_model", **look_up)
    set_by_preset = [method, strength, steps]
    preset.input(bound(preset_chosen), preset, set_by_preset, api_name="highres_preset", **look_up)
    made = start.click(bound(enlarge), given, [pair, note, *export], api_name="highres", **work)
    cancel.click(bound(runs.cancel), api_name="highres_cancel", queue=False, cancels=[made])


def model_changed(studio: Studio, model: Any) -> list[Any]:
    """Prompt, steps, guidance and presets for a model."""
    model = _model(studio, model)
    about = examples.defaults(model)
    choices = gr.update(choices=_presets(model), value=NO_PRESET)
    return [examples.prompts(model)[0], about.steps, about.guidance, choices]


def preset_chosen(studio: Studio, name: Any) -> list[Any]:
    """Method, strength and steps of a preset; guidance stays the model's own."""
    if name == NO_PRESET:
        return [gr.skip()] * 3
    if name not in presets():
        raise ValueError(f"Preset must be one of {', '.join(presets())}.")
    chosen = presets()[name]
    strength = math.ceil(20 * chosen.strength - 1e-9) / 20  # the slider's steps
    return [chosen.method, strength, min(chosen.steps, studio.settings.caps.steps)]


def _presets(model: str) -> list[str]:
    """Those for the family of a bundled model."""
    family = tiny.INFO[model].family if model in tiny.NAMES else ""
    return [NO_PRESET, *(name for name, one in presets().items() if one.family == family)]


def _model(studio: Studio, model: Any) -> str:
    model = inputs.model(studio.settings, model)
    if model not in models(studio) or model not in tiny.NAMES:
        raise ValueError("Choose a bundled model of pictures; others, and videos, on the command line.")
    return model


def enlarge(
    studio: Studio,
    model: Any,
    prompt: Any,
    method: Any,
    times: Any,
    strength: Any,
    steps: Any,
    guidance: Any,
    seed: Any,
    browser: gr.Request,
    progress: gr.Progress = gr.Progress(),  # noqa: B008, by which Gradio knows it
) -> list[Any]:
    """The native picture and one above it, from the same seed.

    Returns:
        the files of both, what was made, then recipe, Python and command.
    """
    from dit_accel import highres, media
    from dit_accel.generation import check_request, execute

    model = _model(studio, model)
    if method not in NAMES:
        raise ValueError(f"Method must be one of {', '.join(NAMES)}.")
    times = inputs.whole("Times the native sides", times, 2, MOST_TIMES)
    strength = inputs.number("Strength", strength, 0.1, 1)
    _, height, width = tiny.INFO[model].native
    sides = (width * times, height * times)
    asked = inputs.request(studio.settings, model, prompt, *sides, None, steps, guidance, seed)
    native = inputs.request(studio.settings, model, prompt, width, height, None, steps, guidance, seed)
    session = studio.sessions.of(browser.session_hash)
    with session.run() as stop:
        progress(0, desc=f"loading {model}" if studio.worker.loaded != model else "starting")
        with studio.worker.pipeline(model) as pipe:
            check_request(pipe, asked)
            call = partial(highres.generate, pipe, method=method, strength=strength)
            made = []
            for label, one, how in (("native", native, None), (method, asked, call)):
                total = 2 * (asked.steps or 1)

                def count(step: int, label: str = label, total: int = total) -> None:
                    runs.check(stop)
                    progress((min(step, total), total), desc=f"{label}, step {step}", unit="steps")

                made.append((label, execute(pipe, one, None, count, call=how)))
        runs.check(stop)
        with session.result() as folder:
            paths = [str(media.save(folder / f"{label}.png", run.frames)) for label, run in made]
    seconds = [run.seconds for _, run in made]
    made_at = f"{sides[0]} x {sides[1]} by {method}: {seconds[1]:.1f} s"
    note = f"{made_at}; native {width} x {height}: {seconds[0]:.1f} s. {NOTE}"
    return [tuple(paths), note, *_export(studio, model, asked, method, strength).values]


def _export(studio: Studio, model: str, asked: Any, method: str, strength: float) -> exports.Export:
    """What makes the large picture again."""
    plain = exports.of_run(studio.settings, model, asked, None, None)
    options = f"--highres={shlex.quote(method)} \\\n  --strength={strength:g}"
    command = f"{plain.command.rstrip()} \\\n  {options}\n"
    python = (
        "from dit_accel import generation, highres\n"
        "from dit_accel.pipelines import load\n\n"
        f"pipe = load({model!r})\n"
        f"request = generation.Request({asked.prompt!r}, {asked.width}, {asked.height}, steps={asked.steps}, "
        f"guidance={asked.guidance}, seed={asked.seed}).with_defaults({model!r}, 'native')\n"
        "arguments = request.arguments(pipe) | {'output_type': 'pil'}\n"
        f"result = highres.generate(pipe, **arguments, method={method!r}, strength={strength:g})\n"
        "result.images[0].save('picture.png')\n"
    )
    return exports.Export("# no recipe\n", python, command)


TAB = Tab("High resolution", build)
