"""`dit-accel generate`: one image or video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runs import Request, check_request, execute, is_video, load
from .errors import reported
from .options import (
    DeviceOption,
    DtypeOption,
    FramesOption,
    GuidanceOption,
    ModelOption,
    PromptOption,
    RecipeOption,
    SeedOption,
    SizeOption,
    StepsOption,
    check_guidance,
    check_output,
    parse_size,
    pick_device,
    pick_dtype,
)
from .output import JsonOption, note, print_json

EXAMPLE = (
    "Example: dit-accel generate --model tiny-flux --out circle.png "
    '--prompt "a red circle at the top left on a striped background"'
)


@reported
def generate(
    model: ModelOption,
    prompt: PromptOption,
    recipe: RecipeOption = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    fps: Annotated[int, typer.Option("--fps", min=1, help="Frames per second of a video.")] = 8,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG for an image; MP4, GIF or PNG for a video.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Generate an image or a video, dense or with a recipe.

    Bundled models start at the size they were trained on; other models at their pipeline's own default.
    """
    from .. import enable, summary
    from ..evals import media
    from ..recipe import resolve

    width, height = parse_size(size) or (None, None)
    check_guidance(guidance)
    if out is not None:
        check_output(out)
    chosen = resolve(recipe) if recipe else None
    target = pick_device(device)
    number = pick_dtype(dtype, target)

    request = Request(prompt, width, height, frames, steps, guidance, seed).with_defaults(model, "native")
    pipe = load(model, number, target)
    check_request(pipe, request)
    path = media.check_suffix(out or Path("out.mp4" if is_video(pipe) else "out.png"), is_video(pipe))
    if chosen:
        enable(pipe, chosen)
    run = execute(pipe, request, "generate")
    media.save(path, run.frames, fps)

    if json:
        answer = {"file": path, "seconds": run.seconds, "seconds_per_step": run.median_step_seconds}
        print_json(
            {**answer, "frames": len(run.frames), "height": run.frames.shape[1], "width": run.frames.shape[2]}
        )
        return
    if chosen:
        note(str(summary(pipe)))
    typer.echo(f"{path}: {run.seconds:.1f} s in all, {run.median_step_seconds:.3f} s per step")


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(generate)
