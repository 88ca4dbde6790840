"""The tab that generates: dense and accelerated from the same seed, side by side, with what it saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from dit_accel.generation import Request
from dit_accel.recipe.recipe import Recipe

from . import examples, exports, inputs, knobs, players, runs
from .tab import LOOK_UPS, MODEL_QUEUE, Studio, Tab, export_area, told

ACCELERATED = "accelerated"


def build(studio: Studio) -> None:
    """Adds the tab's components and events."""
    settings, caps = studio.settings, studio.settings.caps
    first = settings.models[0]
    about = examples.defaults(first)
    presets = examples.recipes(first, about.family)
    start = next(iter(presets))
    with gr.Row(equal_height=False, elem_classes="workbench"):
        with gr.Column(scale=2, min_width=330, elem_classes="controls"):
            model = gr.Dropdown(list(settings.models), value=first, label="Model", filterable=False)
            prompt = gr.Textbox(
                examples.prompts(first)[0], label="Prompt", lines=2, max_lines=4, max_length=caps.prompt
            )
            tries = gr.Radio(
                examples.prompts(first), label="Examples", container=False, elem_classes="examples"
            )
            preset = gr.Dropdown(_choices(presets), value=start, label="Recipe", filterable=False)
            sliders = [
                gr.Slider(**look, interactive=True, elem_id=f"knob-{number}")
                for number, look in enumerate(knobs.sliders(knobs.first_pattern(presets[start]), about.grid))
            ]
            dense_steps = gr.Slider(
                0,
                20,
                presets[start].dense_steps,
                step=1,
                label="Dense steps at the start",
                elem_id="dense-steps",
            )
            numbers = gr.Dropdown(
                list(knobs.NUMBERS),
                value=knobs.numbers_of(presets[start]),
                label="Numbers that attention multiplies",
                filterable=False,
                elem_id="numbers",
            )
            with gr.Row(elem_classes="actions"):
                compare = gr.Button("Compare with dense", variant="primary", scale=3, elem_id="compare")
                alone = gr.Button("Only accelerated", scale=2, elem_id="generate")
                cancel = gr.Button("Cancel", variant="stop", scale=1, min_width=90, elem_id="cancel")
            with gr.Accordion("Size, steps and seed", open=False):
                with gr.Row():
                    width = gr.Number(about.width, label="Width", precision=0, minimum=0, min_width=80)
                    height = gr.Number(about.height, label="Height", precision=0, minimum=0, min_width=80)
                    frames = gr.Number(
                        about.frames,
                        label="Frames",
                        precision=0,
                        minimum=0,
                        min_width=80,
                        visible=about.video,
                    )
                with gr.Row():
                    steps = gr.Number(about.steps, label="Steps", precision=0, minimum=0, min_width=80)
                    guidance = gr.Number(about.guidance, label="Guidance", minimum=0, min_width=80)
                    seed = gr.Number(1, label="Seed", precision=0, minimum=0, min_width=80)
            with gr.Accordion("Recipe as text", open=False):
                recipe = gr.Code(
                    presets[start].to_yaml(), language="yaml", show_label=False, lines=5, elem_id="recipe"
                )
        with gr.Column(scale=3, min_width=420, elem_classes="stage"):
            pair = gr.ImageSlider(
                label="Dense on the left, accelerated on the right",
                type="filepath",
                interactive=False,
                max_height=512,
                height=512,
                visible=not about.video,
                elem_id="pair",
            )
            single = gr.Image(
                label="Accelerated", type="filepath", interactive=False, height=512, visible=False,
                elem_id="single",
            )  # fmt: skip
            video = players.players(visible=about.video, elem_id="players")
            figures = players.figures_area(elem_id="figures")
            export = export_area()

    given = [model, prompt, recipe, width, height, frames, steps, guidance, seed]
    results = [pair, video, figures, *export]
    look_up = {"queue": True, "show_progress": "hidden", "concurrency_id": LOOK_UPS, "concurrency_limit": 2}
    work = {
        "concurrency_id": MODEL_QUEUE,
        "concurrency_limit": 1,
        "show_progress": "full",
        "show_progress_on": [pair, single, video],
    }

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return told(function, studio)

    model.change(
        bound(model_changed),
        model,
        [prompt, tries, preset, width, height, frames, steps, guidance, pair, single, video],
        api_name="model",
        **look_up,
    )
    tries.input(lambda text: text, tries, prompt, api_name="example", **look_up)
    preset.change(
        bound(preset_changed),
        [preset, model],
        [*sliders, dense_steps, recipe, numbers],
        api_name="preset",
        **look_up,
    )
    numbers.input(bound(numbers_chosen), [recipe, numbers], recipe, api_name="numbers", **look_up)
    for number, knob in enumerate((*sliders, dense_steps)):
        knob.input(
            bound(knob_turned),
            [recipe, model, dense_steps, *sliders],
            recipe,
            api_name=f"knob_{number}",
            trigger_mode="always_last",
            **look_up,
        )
    both = compare.click(
        bound(show_pair), given, [pair, single, video], api_name="show_pair", **look_up
    ).success(bound(compare_both), given, results, api_name="compare", **work)
    one = alone.click(
        bound(show_single), given, [pair, single, video], api_name="show_single", **look_up
    ).success(bound(generate_one), given, [single, *results[1:]], api_name="generate", **work)
    cancel.click(bound(runs.cancel), api_name="cancel", queue=False, cancels=[both, one])


def _choices(presets: dict[str, Recipe]) -> list[str]:
    return [*presets, inputs.DENSE]


# -- the page follows what is chosen -------------------------------------------------------------------------


def model_changed(studio: Studio, model: Any) -> list[Any]:
    """Prompt, examples, recipe, sizes and the place of the result for a model."""
    model = inputs.model(studio.settings, model)
    about, prompts = examples.defaults(model), examples.prompts(model)
    presets = examples.recipes(model, about.family)
    return [
        prompts[0],
        gr.Radio(prompts, value=None),
        gr.Dropdown(_choices(presets), value=next(iter(presets))),
        about.width,
        about.height,
        gr.Number(about.frames, visible=about.video or about.family is None),
        about.steps,
        about.guidance,
        *_pair(model),
    ]


def preset_changed(studio: Studio, preset: Any, model: Any) -> list[Any]:
    """Knobs, recipe text and numbers of a preset."""
    grid = examples.defaults(inputs.model(studio.settings, model)).grid
    recipe = inputs.recipe(preset, studio.settings.caps)
    pattern = None if recipe is None else knobs.first_pattern(recipe)
    sliders = [gr.Slider(**look) for look in knobs.sliders(pattern, grid)]
    if recipe is None:
        return [*sliders, gr.Slider(visible=False), inputs.DENSE, knobs.AS_GIVEN]
    whole = isinstance(recipe.dense_steps, int)
    steps = gr.Slider(value=recipe.dense_steps if whole else 0, visible=whole)
    return [*sliders, steps, recipe.to_yaml(), knobs.numbers_of(recipe)]


def knob_turned(studio: Studio, text: Any, model: Any, dense_steps: Any, *values: Any) -> str:
    """The recipe's text with the knobs where they are now."""
    caps = studio.settings.caps
    recipe = inputs.recipe(text, caps)
    if recipe is None:
        return text
    grid = examples.defaults(inputs.model(studio.settings, model)).grid
    pattern = knobs.turned(knobs.first_pattern(recipe), grid, values)
    if isinstance(recipe.dense_steps, int):
        steps = inputs.whole("Dense steps", dense_steps, 0, caps.steps)
    else:
        steps = recipe.dense_steps
    return knobs.with_pattern(recipe, pattern, steps).to_yaml()


def numbers_chosen(studio: Studio, text: Any, numbers: Any) -> str:
    """The recipe's text with attention in these numbers; dense attention becomes a recipe where it is."""
    changed = knobs.with_numbers(inputs.recipe(text, studio.settings.caps), inputs.numbers(numbers))
    return inputs.DENSE if changed is None else changed.to_yaml()


def show_pair(studio: Studio, *given: Any) -> list[Any]:
    """Where a comparison will appear, of inputs that are checked before they wait for their turn."""
    return _pair(_asked(studio, given, dense_too=True)[0])


def show_single(studio: Studio, *given: Any) -> list[Any]:
    """Where one picture will appear, likewise."""
    video = _is_video(_asked(studio, given, dense_too=False)[0])
    return [gr.ImageSlider(visible=False), gr.Image(visible=not video), gr.HTML(visible=video)]


def _pair(model: str) -> list[Any]:
    video = _is_video(model)
    return [gr.ImageSlider(visible=not video), gr.Image(visible=False), gr.HTML(visible=video)]


def _is_video(model: str) -> bool:
    return examples.defaults(model).video


# -- runs ----------------------------------------------------------------------------------------------------


def compare_both(
    studio: Studio,
    model: Any,
    prompt: Any,
    recipe: Any,
    width: Any,
    height: Any,
    frames: Any,
    steps: Any,
    guidance: Any,
    seed: Any,
    browser: gr.Request,
    progress: gr.Progress = gr.Progress(),  # noqa: B008, by which Gradio knows it
) -> list[Any]:
    """Dense and accelerated from the same seed.

    Returns:
        files of a pair of pictures, or of videos, then figures, recipe, Python and command.
    """
    given = (model, prompt, recipe, width, height, frames, steps, guidance, seed)
    return _made(studio, given, browser, progress, dense_too=True)


def generate_one(
    studio: Studio,
    model: Any,
    prompt: Any,
    recipe: Any,
    width: Any,
    height: Any,
    frames: Any,
    steps: Any,
    guidance: Any,
    seed: Any,
    browser: gr.Request,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> list[Any]:
    """One picture or video, with the recipe.

    Returns:
        the file of a picture, or of a video, then figures, recipe, Python and command.
    """
    given = (model, prompt, recipe, width, height, frames, steps, guidance, seed)
    return _made(studio, given, browser, progress, dense_too=False)


def _asked(
    studio: Studio, given: tuple, dense_too: bool
) -> tuple[str, Request, Recipe | None, list[tuple[str, Recipe | None]]]:
    """Model, request, recipe, and what to make by its name, dense first if that too."""
    settings = studio.settings
    model, prompt, recipe, *numbers = given
    model = inputs.model(settings, model)
    chosen = inputs.recipe(recipe, settings.caps)
    asked = inputs.request(settings, model, prompt, *numbers)
    if dense_too and chosen is None:
        raise ValueError("Choose a recipe to compare with dense attention.")
    pairs: list[tuple[str, Recipe | None]] = [] if chosen is None else [(ACCELERATED, chosen)]
    if dense_too or chosen is None:
        pairs.insert(0, (runs.DENSE, None))
    return model, asked, chosen, pairs


def _made(
    studio: Studio, given: tuple, browser: gr.Request, progress: gr.Progress, dense_too: bool
) -> list[Any]:
    """What the page shows of a run, and what makes the last of it again."""
    model, asked, chosen, pairs = _asked(studio, given, dense_too)
    session = studio.sessions.of(browser.session_hash)
    request, shown = runs.run(studio, session, model, asked, pairs, progress)
    video, files = shown[0].video, tuple(str(one.path) for one in shown)
    export = exports.of_run(studio.settings, model, request, chosen, runs.FPS if video else None)
    pictures = [None, players.sources(shown)] if video else [files if dense_too else files[0], []]
    return [*pictures, players.for_people(runs.figures(shown)), *export.values]


TAB = Tab("Generate", build)
