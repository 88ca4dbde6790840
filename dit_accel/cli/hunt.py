"""`dit-accel hunt`: the attention heads whose perturbation guides a model best."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.evals.metrics import prompts as prompt_file
from dit_accel.generation import Request, check_request, load, transformers

from . import options as opt
from .errors import reported
from .output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_accel.guidance.hunter import HeadHunter, Hunt
    from dit_accel.guidance.objectives import Objective

RECIPE = "recipe.yaml"
EXAMPLE = (
    "Example: dit-accel hunt --model tiny-flux --objective attributes --rounds 5 --top-k 3 -n 32 "
    "--out outputs/hunt"
)


@reported
def hunt(
    model: opt.ModelOption,
    objective: Annotated[
        list[str],
        typer.Option(
            "--objective",
            help="attributes or scenes (bundled models: a rule's count, a trained net's probability), clip, "
            "pickscore, aesthetics or hpsv2, the last four also with a folder of weights, as clip:FOLDER; "
            "several: their harmonic mean.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the heads, log, images and pictures.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to draw; repeat it for several. Bundled models need none."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with a prompt on each line.")
    ] = None,
    samples: Annotated[
        int,
        typer.Option("-n", "--samples", min=1, max=opt.MOST_SAMPLES, help="Prompt-seed pairs of each trial."),
    ] = 5,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=10_000, help="Rounds of the search.")] = 5,
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=10_000, help="Heads that each round adds.")] = 3,
    at_least: Annotated[
        list[str] | None,
        typer.Option("--at-least", help="OBJECTIVE=MINIMUM: do not add heads below, as in pickscore=20."),
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="soft_pag, uniform or seg.")] = "soft_pag",
    strength: Annotated[float, typer.Option("--strength", help="Of the perturbation, 0 to 1.")] = 1.0,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Of perturbation guidance; 8 for FLUX, else 3.")
    ] = None,
    only: Annotated[
        str, typer.Option("--only", help='Search these layers or heads: "single", "double.0-3/heads.0-7".')
    ] = "all",
    recipe: opt.RecipeOption = None,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    steps: opt.StepsOption = None,
    guidance: opt.GuidanceOption = None,
    seed: Annotated[int, opt.seed_option("Seed of the first pair.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, max=10_000, help="Samples generated at once.")] = 5,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Fetch a scorer's weights from the hub.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --out.")] = False,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw the heat map and the sheet of effects.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Search the attention heads whose perturbation guides a model best, greedily (HeadHunter).

    Every round tries each head that is left together with those chosen, on the same prompts and seeds,
    without classifier-free guidance, and adds the best. --out then holds heads.json, which a recipe names as
    its `guidance`, and recipe.yaml, which does. Several processes share the work when started by
    `accelerate launch --multi_gpu -m dit_accel.cli hunt ...`.
    For quality instead of a style: --rounds 1 --top-k 24 -n 20 --strength 0.25.
    """
    from dit_accel import enable
    from dit_accel.guidance import HeadHunter, HeadPerturbation
    from dit_accel.guidance.head_pictures import MAP
    from dit_accel.guidance.objectives import BUNDLED
    from dit_accel.plots import check_plot
    from dit_accel.recipe.recipe import resolve

    if out.exists() and not out.is_dir():
        raise ValueError(f"`--out` must be a folder, got the file {out}")
    if pictures:
        check_plot(out / MAP, ", or do without (--no-pictures)")
    opt.check_guidance(guidance)
    width, height = opt.parse_size(size) or (None, None)
    chosen = resolve(recipe) if recipe else None
    target, state = opt.pick_shared_device(device)
    options = {"kind": kind, "strength": strength} | ({} if scale is None else {"scale": scale})
    HeadPerturbation([0], **options)  # refuses bad ones before anything is loaded
    goal, floors = _objectives(objective, at_least or [], model, target, allow_download)
    pairs = _pairs(prompt or [], prompts, model, samples, seed, not set(BUNDLED).isdisjoint(objective))

    request = Request("", width, height, frames, steps, guidance).with_defaults(model, "native")
    pipe = load(model, opt.pick_dtype(dtype, target), target)
    pipe.set_progress_bar_config(disable=True)
    request = _published(pipe, replace(request, guidance=guidance))
    check_request(pipe, request)
    if chosen:
        enable(pipe, chosen)
    call = request.arguments(pipe)
    call = {k: v for k, v in call.items() if k not in ("prompt", "generator", "output_type")}
    hunter = HeadHunter(
        pipe,
        goal,
        pairs,
        out,
        rounds=rounds,
        top_k=top_k,
        perturbation=options,
        floors=floors,
        heads=_heads(pipe, only),
        call=call,
        batch=batch,
    )
    if state.is_main_process:
        note(f"{model}: {len(hunter.heads)} heads, {len(pairs)} prompt-seed pairs, {request.steps} steps")
    found = hunter.run(resume, progress=sys.stderr.isatty())
    if not state.is_main_process:
        return
    files = _write(hunter, found, recipe, pictures)
    if json:
        print_json({**found.to_dict(), "guidance": hunter.options, "files": files})
    else:
        _show(found, files)


def _objectives(
    names: list[str], at_least: list[str], model: str, device: torch.device, allow_download: bool
) -> tuple[Objective, list[tuple[Objective, float]]]:
    """The objective and the floors, each scorer loaded once."""
    from dit_accel.evals.metrics.attributes import check_bundled
    from dit_accel.guidance.objectives import BUNDLED, HarmonicMean, named

    minima = {}
    for text in at_least:
        name, _, number = text.rpartition("=")
        try:
            minima[name] = float(number)
        except ValueError:
            minima[name] = math.nan
        if not (name and math.isfinite(minima[name])):
            raise ValueError(
                f"`--at-least` must be OBJECTIVE=MINIMUM, such as pickscore=20, got {text!r:.80}"
            )
    if not {*names, *minima}.isdisjoint(BUNDLED):
        check_bundled(model)
    loaded = {name: named(name, device, allow_download) for name in dict.fromkeys((*names, *minima))}
    goals = [loaded[name] for name in dict.fromkeys(names)]
    goal = goals[0] if len(goals) == 1 else HarmonicMean(goals)
    return goal, [(loaded[name], minimum) for name, minimum in minima.items()]


def _pairs(
    given: list[str], file: Path | None, model: str, count: int, seed: int, captions: bool
) -> list[tuple[str, int]]:
    """Prompts in turn, with seeds that count up; without prompts, held-out captions of a bundled model."""
    from dit_accel.pipelines import tiny

    texts = list(given)
    if file is not None:
        texts += prompt_file.read(file)
    if captions:
        for text in texts:
            tiny.read_caption(text)
    if len(texts) > count:
        raise ValueError(
            f"{len(texts)} prompts need at least as many pairs; use -n {len(texts)}, got {count}"
        )
    if not texts and model not in tiny.NAMES:
        raise ValueError("give the prompts to search with, by --prompt or --prompts FILE")
    if not texts:
        from dit_accel.pipelines.tiny.evaluate import held_out_scenes

        info = tiny.INFO[model]
        texts = [tiny.caption(scene) for scene in held_out_scenes(count, seed, info.video)]
    return [(texts[i % len(texts)], seed + i) for i in range(count)]


def _published(pipe: DiffusionPipeline, request: Request) -> Request:
    """Fills steps and size as published for the family, and turns classifier-free guidance off.

    A distilled model keeps its own guidance scale, which is an input of its transformer.
    """
    from dit_accel.pipelines.families import family_of

    transformer = transformers(pipe)[0]
    search = family_of(transformer).head_search
    distilled = getattr(transformer.config, "guidance_embeds", False)
    defaults = {
        "steps": search.steps,
        "width": search.side if request.height is None else None,
        "height": search.side if request.width is None else None,
        "guidance": None if distilled else 1.0,
    }
    missing = {field: value for field, value in defaults.items() if getattr(request, field) is None}
    return replace(request, **missing).with_steps(pipe)


def _heads(pipe: DiffusionPipeline, only: str) -> list[tuple[int, int]]:
    from dit_accel.layer_names import flat_indices
    from dit_accel.pipelines.families import family_of
    from dit_accel.recipe import selectors

    transformer = transformers(pipe)[0]
    family = family_of(transformer)
    names = list(family.layers(transformer))
    flat = flat_indices(names)
    chosen = selectors.select(only, names, family.heads(transformer)[0])
    return sorted({(flat[place], head) for place, heads in chosen for head in heads})


def _write(hunter: HeadHunter, found: Hunt, recipe: str | None, pictures: bool) -> dict[str, Path]:
    """The recipe and the pictures, beside what the search itself has written."""
    from dit_accel import media
    from dit_accel.files import write_text
    from dit_accel.guidance.head_pictures import MAP, SHEET, effects_sheet, heat_map
    from dit_accel.guidance.hunter import FOUND, LOG
    from dit_accel.recipe.recipe import resolve
    from dit_accel.recipe.yaml_text import to_yaml

    folder = hunter.folder
    files = {"log": folder / LOG}
    if found.heads:
        files |= {"heads": folder / FOUND, "recipe": folder / RECIPE}
        data = resolve(recipe).to_dict() if recipe else {"attention": {"pattern": "Dense"}}
        write_text(files["recipe"], to_yaml({**data, "guidance": FOUND}))
    if pictures:
        files |= {"heat map": folder / MAP, "sheet": folder / SHEET}
        heat_map(found, files["heat map"])
        pair = hunter.pairs[0]
        sheet = effects_sheet(found, lambda heads: hunter.trials.image(hunter.perturbation(heads), pair))
        media.save(files["sheet"], sheet[None])
    return files


def _show(found: Hunt, files: dict[str, Any]) -> None:
    rows = [("without guidance", "", f"{found.without:.4f}")]
    rows += [
        (
            f"round {number}",
            ", ".join(f"{found.layers[layer]} head {head}" for layer, head in one.chosen),
            f"{one.score:.4f}",
        )
        for number, one in enumerate(found.rounds, 1)
    ]
    print_table(f"Heads by {found.objective}", ("", "added", "score"), rows)
    typer.echo(f"chosen: the {len(found.best)} heads of the best round and those before it")
    for name, path in files.items():
        typer.echo(f"{name}: {path}")


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog=EXAMPLE)(hunt)
