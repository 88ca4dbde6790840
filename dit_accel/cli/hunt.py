"""`dit-accel hunt`: the attention heads whose perturbation guides a model best."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..evals import prompts as prompt_file
from ..runs import Request, check_request, load, transformers
from .errors import reported
from .options import (
    DeviceOption,
    DtypeOption,
    FramesOption,
    GuidanceOption,
    ModelOption,
    RecipeOption,
    SizeOption,
    StepsOption,
    check_guidance,
    parse_size,
    pick_dtype,
    pick_shared_device,
)
from .output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..guidance.hunter import HeadHunter, Hunt
    from ..guidance.objectives import Objective

RECIPE = "recipe.yaml"
STEPS = {"flux": 15, "sd3": 20}  # published; bundled models have their own
SIZES = {"flux": 512}
EXAMPLE = (
    "Example: dit-accel hunt --model tiny-flux --objective attributes --rounds 5 --top-k 3 -n 32 "
    "--out outputs/hunt"
)


@reported
def hunt(
    model: ModelOption,
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
        int, typer.Option("-n", "--samples", min=1, help="Prompt-seed pairs of each trial.")
    ] = 5,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of the search.")] = 5,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Heads that each round adds.")] = 3,
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
    recipe: RecipeOption = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the first pair.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples generated at once.")] = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
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
    from .. import enable
    from ..evals.plots import check_plot
    from ..guidance import HeadHunter
    from ..guidance.hunt_pictures import MAP
    from ..guidance.objectives import BUNDLED
    from ..recipe import resolve

    if out.exists() and not out.is_dir():
        raise ValueError(f"`--out` must be a folder, got the file {out}")
    if pictures:
        check_plot(out / MAP, ", or do without (--no-pictures)")
    check_guidance(guidance)
    width, height = parse_size(size) or (None, None)
    chosen = resolve(recipe) if recipe else None
    target, state = pick_shared_device(device)
    goal, floors = _objectives(objective, at_least or [], model, target, allow_download)
    pairs = _pairs(prompt or [], prompts, model, samples, seed, not set(BUNDLED).isdisjoint(objective))

    request = Request("", width, height, frames, steps, guidance).with_defaults(model, "native")
    pipe = load(model, pick_dtype(dtype, target), target)
    pipe.set_progress_bar_config(disable=True)
    request = _published(pipe, replace(request, guidance=guidance))
    check_request(pipe, request)
    if chosen:
        enable(pipe, chosen)
    options = {"kind": kind, "strength": strength} | ({} if scale is None else {"scale": scale})
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
    from ..evals.attributes import check_bundled
    from ..guidance.objectives import BUNDLED, HarmonicMean, named

    minima = {}
    for text in at_least:
        name, _, number = text.rpartition("=")
        try:
            minima[name] = float(number)
        except ValueError:
            raise ValueError(
                f"`--at-least` must be OBJECTIVE=MINIMUM, such as pickscore=20, got {text!r}"
            ) from None
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
    from ..guidance.objectives import read_caption
    from ..pipelines import tiny

    texts = list(given)
    if file is not None:
        texts += prompt_file.read(file)
    if captions:
        for text in texts:
            read_caption(text)
    if len(texts) > count:
        raise ValueError(
            f"{len(texts)} prompts need at least as many pairs; use -n {len(texts)}, got {count}"
        )
    if not texts and model not in tiny.NAMES:
        raise ValueError("give the prompts to search with, by --prompt or --prompts FILE")
    if not texts:
        from ..pipelines.tiny.evaluate import held_out_scenes

        video = tiny.INFO[model].video
        texts = [tiny.caption(scene) for scene in held_out_scenes(count, seed, video)]
    return [(texts[i % len(texts)], seed + i) for i in range(count)]


def _published(pipe: DiffusionPipeline, request: Request) -> Request:
    """Fills steps and size as published for the family, and turns classifier-free guidance off.

    A distilled model keeps its own guidance scale, which is an input of its transformer.
    """
    from ..pipelines import family_of

    transformer = transformers(pipe)[0]
    name = family_of(transformer).name
    distilled = getattr(transformer.config, "guidance_embeds", False)
    defaults = {
        "steps": STEPS.get(name),
        "width": SIZES.get(name) if request.height is None else None,
        "height": SIZES.get(name) if request.width is None else None,
        "guidance": None if distilled else 1.0,
    }
    missing = {field: value for field, value in defaults.items() if getattr(request, field) is None}
    return replace(request, **missing).with_steps(pipe)


def _heads(pipe: DiffusionPipeline, only: str) -> list[tuple[int, int]]:
    from .. import selectors
    from ..pipelines import family_of

    transformer = transformers(pipe)[0]
    names = list(family_of(transformer).layers(transformer))
    flat = selectors.flat_indices(names)
    chosen = selectors.select(only, names, transformer.config.num_attention_heads)
    return sorted({(flat[place], head) for place, heads in chosen for head in heads})


def _write(hunter: HeadHunter, found: Hunt, recipe: str | None, pictures: bool) -> dict[str, Path]:
    """The recipe and the pictures, beside what the search itself has written."""
    import yaml

    from ..evals import media
    from ..guidance.hunt_pictures import MAP, SHEET, effects_sheet, heat_map
    from ..guidance.hunter import FOUND, LOG
    from ..recipe import resolve

    folder = hunter.folder
    files = {"log": folder / LOG}
    if found.heads:
        files |= {"heads": folder / FOUND, "recipe": folder / RECIPE}
        data = resolve(recipe).to_dict() if recipe else {"attention": {"pattern": "Dense"}}
        with media.atomic(files["recipe"]) as partial:
            partial.write_text(yaml.safe_dump({**data, "guidance": FOUND}, sort_keys=False))
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
    typer.echo(f"kept: the {len(found.best)} heads of the best round and those before it")
    for name, path in files.items():
        typer.echo(f"{name}: {path}")


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(hunt)
