"""`dit-accel generate`: one image or video."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.generation import Request, check_request, execute, is_video, load, transformers

from . import options as opt
from . import plan_highres
from .errors import reported
from .output import JsonOption, note, print_json

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_accel.highres import Preset
    from dit_accel.recipe.recipe import Recipe

EXAMPLE = (
    "Example: dit-accel generate --model tiny-flux --out fox.png "
    '--prompt "a fox at the top left on a blue striped background"'
)


@reported
def generate(
    model: opt.ModelOption,
    prompt: opt.PromptOption,
    recipe: opt.RecipeOption = None,
    quantization: opt.QuantizationOption = None,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    steps: opt.StepsOption = None,
    guidance: opt.GuidanceOption = None,
    seed: opt.SeedOption = 0,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    fps: Annotated[int, typer.Option("--fps", min=1, max=1000, help="Frames per second of a video.")] = 8,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG for an image; MP4, GIF or PNG for a video.")
    ] = None,
    highres: Annotated[
        str | None,
        typer.Option(
            "--highres",
            help="Method for a --size above the trained one (swim, flow, growing, ...) or a preset of "
            "`dit-accel recipes --highres`.",
        ),
    ] = None,
    strength: opt.StrengthOption = None,
    guidance_above: Annotated[
        float | None,
        typer.Option("--guidance-above", help="With --highres: guidance above the trained size."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep", help="With --highres: .safetensors file of the trained size's result, to go on from."
        ),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            help="With --highres regional: TOP,LEFT,BOTTOM,RIGHT=WORDS, in fractions of the sides.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="With --highres: say what each stage takes, and generate nothing."),
    ] = False,
    share: Annotated[
        str | None,
        typer.Option(
            "--share", help="heads or rows: what processes of `accelerate launch` share of each call."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Generate an image or a video, dense or with a recipe; with --highres larger than the model can.

    Bundled models start at the size they were trained on; other models at their pipeline's own default.
    Several processes make one picture together when started by
    `accelerate launch --multi_gpu -m dit_accel.cli generate --share heads ...`.
    """
    from dit_accel import enable, media, summary
    from dit_accel.parallel import context_parallel, patch_parallel
    from dit_accel.patterns import Dense
    from dit_accel.pipelines.families import family_of
    from dit_accel.recipe.recipe import resolve

    width, height = opt.parse_size(size) or (None, None)
    opt.check_guidance(guidance)
    opt.check_guidance(guidance_above, "--guidance-above")
    opt.check_strength(strength)
    if highres is None and (keep is not None or guidance_above is not None or plan):
        raise ValueError("`--keep`, `--guidance-above` and `--plan` belong to `--highres METHOD`")
    preset = None if highres is None else _check_highres(highres, size, keep)
    regions = _regions(region, highres)
    if preset is not None:
        highres, steps, strength = preset.method, steps or preset.steps, strength or preset.strength
        guidance = preset.guidance if guidance is None else guidance
        guidance_above = preset.guidance_above if guidance_above is None else guidance_above
    if out is not None:
        opt.check_output(out)
    chosen = opt.with_quantization(resolve(recipe) if recipe else None, quantization)
    target, main = _check_share(share, highres, chosen, device)
    number = opt.pick_dtype(dtype, target)
    if plan and highres is not None:
        return plan_highres.give(
            json,
            highres,
            opt.parse_size(size),
            model=model,
            frames=frames,
            steps=steps,
            strength=strength,
            guided=None if guidance is None else guidance > 1,
            recipe=chosen,
            device=target.type,
            dtype=number,
        )

    request = Request(prompt, width, height, frames, steps, guidance, seed).with_defaults(model, "native")
    pipe = load(model, number, target)
    if preset is not None:
        preset.check_family(family_of(transformers(pipe)[0]).name)
    check_request(pipe, request)
    path = media.check_suffix(out or Path("out.mp4" if is_video(pipe) else "out.png"), is_video(pipe))
    sharing = nullcontext()
    if share == "rows":
        sharing = patch_parallel(pipe, chosen)
    elif share == "heads":
        context_parallel(pipe)
        enable(pipe, chosen or Dense())  # some models' own attention knows of no other process
    elif chosen:
        enable(pipe, chosen)
    call = None
    if highres is not None:
        shift = None if preset is None else preset.shift
        call = _above(pipe, request, highres, strength, guidance_above, keep, regions, shift)
    with sharing:
        run = execute(pipe, request, "generate", call=call)
        told = str(summary(pipe)) if chosen else ""
    if not main:
        return None
    media.save(path, run.frames, fps)
    if media.one_colour(run.frames):
        note("warning: every pixel has the same colour; try another --dtype, or more --steps")

    if json:
        answer = {"file": path, "seconds": run.seconds, "seconds_per_step": run.median_step_seconds}
        print_json(
            {**answer, "frames": len(run.frames), "height": run.frames.shape[1], "width": run.frames.shape[2]}
        )
        return None
    if chosen:
        note(told)
    typer.echo(f"{path}: {run.seconds:.1f} s in all, {run.median_step_seconds:.3f} s per step")
    return None


def _check_share(
    share: str | None, highres: str | None, recipe: Recipe | None, device: str
) -> tuple[torch.device, bool]:
    """The device of this process, and whether it is the one that tells what was made."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if share is None:
        if started > 1:
            raise ValueError(f"{started} processes would each make the same; give `--share heads` or `rows`")
        return opt.pick_device(device), True
    if share not in ("heads", "rows"):
        raise ValueError(f"`--share` must be heads or rows, got {share!r}")
    if highres is not None:
        raise ValueError("`--share` and `--highres` do not go together; start one process")
    if share == "rows" and recipe is None:
        raise ValueError("`--share rows` needs a `--recipe` whose pattern is local, such as flux-clear-r16")
    if started == 1:
        raise ValueError("`--share` is for several processes; start them with `accelerate launch`")
    target, state = opt.pick_shared_device(device)
    return target, state.is_main_process


def _check_highres(method: str, size: str | None, keep: Path | None) -> Preset | None:
    """Refuses, before a model is loaded, what no model could do; the preset where one is named."""
    from dit_accel.highres.keeping import check_path
    from dit_accel.highres.presets import preset_of

    preset = preset_of(method)
    if size is None:
        raise ValueError("`--highres` needs `--size`, that of the result")
    if keep is not None:
        check_path(keep)
    return preset


def _regions(given: list[str] | None, method: str | None) -> dict[tuple[float, ...], str]:
    """Words by box, of `--region`."""
    if given and method != "regional":
        raise ValueError("`--region` belongs to `--highres regional`")
    found: dict[tuple[float, ...], str] = {}
    for text in given or ():
        box, _, words = text.partition("=")
        try:
            found[tuple(float(x) for x in box.split(","))] = words.strip()
        except ValueError:
            raise ValueError(
                f"`--region` must be TOP,LEFT,BOTTOM,RIGHT=WORDS, such as '0,0,1,0.5=a red fox', got {text!r}"
            ) from None
    return found


def _above(
    pipe: DiffusionPipeline,
    request: Request,
    method: str,
    strength: float | None,
    guidance: float | None,
    keep: Path | None,
    regions: dict[tuple[float, ...], str],
    shift: float | None,
) -> Callable[..., Any]:
    """What generates by a high-resolution method, with the arguments of a call of the pipeline."""
    from dit_accel import highres
    from dit_accel.highres.native import Native

    how: Any = method
    if regions:
        native = Native.of(pipe)
        how = replace(highres.Regional.suited(native, native.size), prompts=regions)
    given = replace(request, guidance=guidance).arguments(pipe)
    names = () if guidance is None else ("guidance_scale", "true_cfg_scale", "negative_prompt")
    above = {name: given[name] for name in names if name in given}
    options = {"method": how, "above": above, "keep": keep, "shift": shift}
    options |= {} if strength is None else {"strength": strength}
    return partial(highres.generate, pipe, **options)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog=EXAMPLE)(generate)
