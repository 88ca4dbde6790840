"""The tab of high resolution: above the size a model was trained for, beside the same seed without."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from dit_accel.highres import METHODS, presets
from dit_accel.pipelines import tiny

from . import examples, exports, inputs, players, runs
from .sessions import Session
from .tab import LOOK_UPS, MODEL_QUEUE, Studio, Tab, export_area, told

if TYPE_CHECKING:
    from dit_accel.generation import Request

MOST_TIMES = 4  # the native sides
LONGER = "windows"  # the method of longer videos, which does nothing for a picture
NATIVE = "native"
NO_PRESET = "none"
NOTE = (
    "Both from the same seed: first at the native size, then by the method. `growing` is the cheapest; "
    "`direct`, `upscaled` and `naive` are baselines."
)


def models(studio: Studio) -> list[str]:
    """Those of the demo whose native size is known."""
    found = [name for name in studio.settings.models if name in tiny.NAMES]
    return found or list(studio.settings.models[:1])


def methods(video: bool) -> list[str]:
    """Names of what may be chosen."""
    return [name for name in METHODS if video or name != LONGER]


def build(studio: Studio) -> None:
    """Adds the tab's components and events."""
    known, caps = models(studio), studio.settings.caps
    about = examples.defaults(known[0])
    with gr.Row(equal_height=False, elem_classes="workbench"):
        with gr.Column(scale=2, min_width=330, elem_classes="controls"):
            model = gr.Dropdown(
                known, value=known[0], label="Model", filterable=False, elem_id="highres-model"
            )
            prompt = gr.Textbox(
                examples.prompts(known[0])[0], label="Prompt", lines=2, max_lines=4, max_length=caps.prompt
            )
            preset = gr.Dropdown(
                _presets(known[0]), value=NO_PRESET, label="Preset, as published", filterable=False
            )
            method = gr.Dropdown(methods(about.video), value="swim", label="Method", filterable=False)
            times = gr.Slider(**_times(about.video), label="Times the native sides", interactive=True)
            strength = gr.Slider(0.1, 1, 0.7, step=0.05, label="Strength: share of the steps above native")
            frames = gr.Number(**_frames(known[0]), label="Frames", precision=0, minimum=0, min_width=80)
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
                visible=not about.video,
                elem_id="enlarged",
            )
            video = players.players(visible=about.video, elem_id="enlarged-players")
            note = gr.Markdown(NOTE, elem_classes="notes", elem_id="highres-note", sanitize_html=True)
            export = export_area()

    given = [model, prompt, method, times, strength, frames, steps, guidance, seed]
    work = {"concurrency_id": MODEL_QUEUE, "concurrency_limit": 1, "show_progress_on": [pair, video]}

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return told(function, studio)

    look_up = {"show_progress": "hidden", "concurrency_id": LOOK_UPS, "concurrency_limit": 2}
    changed = [prompt, preset, method, times, frames, steps, guidance, pair, video]
    model.change(bound(model_changed), model, changed, api_name="highres_model", **look_up)
    set_by_preset = [method, strength, steps]
    preset.input(bound(preset_chosen), preset, set_by_preset, api_name="highres_preset", **look_up)
    made = start.click(bound(enlarge), given, [pair, video, note, *export], api_name="highres", **work)
    cancel.click(bound(runs.cancel), api_name="highres_cancel", queue=False, cancels=[made])


def _times(video: bool) -> dict[str, Any]:
    """A longer video may have its native sides."""
    return {"minimum": 1 if video else 2, "maximum": MOST_TIMES, "value": 2, "step": 1}


def _frames(model: str) -> dict[str, Any]:
    """The native number of a bundled model."""
    native = tiny.INFO[model].native[0] if model in tiny.NAMES else 1
    info = f"The model was trained with {native}; more are joined from windows."
    return {"value": native if native > 1 else None, "info": info, "visible": native > 1}


def model_changed(studio: Studio, model: Any) -> list[Any]:
    """Prompt, presets, method, size, steps, guidance and the place of the result for a model."""
    model = _model(studio, model)
    about = examples.defaults(model)
    return [
        examples.prompts(model)[0],
        gr.Dropdown(_presets(model), value=NO_PRESET),
        gr.Dropdown(methods(about.video), value="swim"),
        gr.Slider(**_times(about.video)),
        gr.Number(**_frames(model)),
        about.steps,
        about.guidance,
        gr.ImageSlider(visible=not about.video),
        gr.HTML(visible=about.video),
    ]


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
    if model not in tiny.NAMES:
        raise ValueError("Choose a bundled model; the command line takes others.")
    return model


def _request(
    studio: Studio, model: str, prompt: Any, method: Any, times: Any, frames: Any, *numbers: Any
) -> tuple[Request, Request]:
    """What is asked for at the native sides and above, checked."""
    count, height, width = tiny.INFO[model].native
    video = count > 1
    if method not in methods(video):
        raise ValueError(f"Method must be one of {', '.join(methods(video))}.")
    times = inputs.whole("Times the native sides", times, 1 if video else 2, MOST_TIMES)
    settings = studio.settings
    native, asked = (
        inputs.request(settings, model, prompt, width * n, height * n, frames, *numbers) for n in (1, times)
    )
    if times == 1 and (asked.frames or 1) <= count:
        raise ValueError(f"This is the native size; take more than {count} frames, or larger sides.")
    return native, asked


def enlarge(
    studio: Studio,
    model: Any,
    prompt: Any,
    method: Any,
    times: Any,
    strength: Any,
    frames: Any,
    steps: Any,
    guidance: Any,
    seed: Any,
    browser: gr.Request,
    progress: gr.Progress = gr.Progress(),  # noqa: B008, by which Gradio knows it
) -> list[Any]:
    """The same seed at the native sides and by a method above them.

    Returns:
        the files of a pair of pictures, or of videos, what was made, then recipe, Python and command.
    """
    model = _model(studio, model)
    native, asked = _request(studio, model, prompt, method, times, frames, steps, guidance, seed)
    above = exports.Above(method, inputs.number("Strength", strength, 0.1, 1) or 0)
    session = studio.sessions.of(browser.session_hash)
    shown = runs.in_its_thread(_run, studio, session, model, progress, native, asked, above)
    files = tuple(str(one.path) for one in shown)
    pictures = [None, players.sources(shown)] if shown[0].video else [files, []]
    fps = runs.FPS if shown[0].video else None
    export = exports.of_run(studio.settings, model, asked, None, fps, above)
    return [*pictures, _said(shown), *export.values]


def _run(
    studio: Studio,
    session: Session,
    model: str,
    progress: gr.Progress,
    native: Request,
    asked: Request,
    above: exports.Above,
    stop: threading.Event,
) -> list[runs.Shown]:
    from dit_accel import highres, media
    from dit_accel.generation import check_request, execute

    steps, made = asked.steps or 1, []
    total = 2 * steps + int(steps * above.strength)  # the method begins with a native pass as well
    with studio.worker.pipeline(model) as pipe:
        runs.check(stop)
        check_request(pipe, asked)
        way = partial(highres.generate, pipe, method=above.method, strength=above.strength)
        for label, request, call in ((NATIVE, native, None), (above.method, asked, way)):

            def count(step: int, label: str = label, before: int = steps * len(made)) -> None:
                runs.check(stop)
                progress((min(before + step, total), total), desc=f"{label}, step {step}", unit="steps")

            made.append((label, execute(pipe, request, None, count, call=call)))
    runs.check(stop)
    kind = "mp4" if asked.frames else "png"
    with session.result() as folder:
        return [
            runs.Shown(label, run, 1.0, media.save(folder / f"{label}.{kind}", run.frames, runs.FPS))
            for label, run in made
        ]


def _said(shown: list[runs.Shown]) -> str:
    """What was made and how long it took."""
    rows = []
    for one in shown:
        frames, height, width, _ = one.run.frames.shape
        length = f", {frames} frames" if frames > 1 else ""
        rows.append(f"**{one.label}**: {width} × {height}{length}, {one.run.seconds:.1f} s")
    return f"{'; '.join(rows)}. {NOTE}"


TAB = Tab("High resolution", build)
