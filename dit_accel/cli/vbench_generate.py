"""`dit-accel eval vbench generate`: the videos that VBench scores, by one process or several."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.generation import Request, check_request, is_video, load
from dit_accel.json_files import check_same, read_json, write_json

from . import options as opt
from . import vbench_options as vb
from .errors import reported
from .output import JsonOption, note, print_json
from .results import head, track

VIDEOS_SCHEMA = "dit-accel/vbench-videos/1"
EXAMPLE = f"{vb.START} generate -m tiny-wan -r tiny-wan-radial --prompts prompts.txt --out videos/"


@reported
def generate(
    model: opt.ModelOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the videos; {FOLDER}.json beside it.")],
    prompts: vb.PromptsOption = None,
    vbench_python: vb.PythonOption = None,
    dimensions: vb.DimensionsOption = None,
    samples: vb.SamplesOption = None,
    recipe: opt.RecipeOption = None,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    steps: opt.StepsOption = None,
    guidance: opt.GuidanceOption = None,
    seed: Annotated[int, opt.seed_option("Video i starts from the noise seed + i.")] = 0,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    fps: Annotated[int, typer.Option("--fps", min=1, max=1000, help="Frames per second.")] = 8,
    json: JsonOption = False,
) -> None:
    """Generate the videos that VBench scores: 5 per prompt, 25 of the prompts for temporal flickering.

    Whole videos that are in --out stay, so a run that was stopped goes on. Several processes share the work
    when started by `accelerate launch --multi_gpu -m dit_accel.cli eval vbench generate ...`; who makes a
    video does not change it.
    """
    from dit_accel import enable, media
    from dit_accel.evals.vbench.suite import find
    from dit_accel.recipe.recipe import resolve

    width, height = opt.parse_size(size) or (None, None)
    opt.check_guidance(guidance)
    chosen = resolve(recipe) if recipe else None
    wanted = vb.pick_prompts(prompts, vbench_python, vb.pick_dimensions(dimensions))
    found = find(out, wanted, samples)
    target, state = opt.pick_shared_device(device)
    number = opt.pick_dtype(dtype, target)
    request = Request("", width, height, frames, steps, guidance, seed).with_defaults(model, "native")
    if request.frames == 1:
        raise ValueError("`--frames` must be at least 2: VBench compares the frames of a video")
    record = {
        "model": model,
        "recipe": chosen and chosen.to_dict(),
        "request": {key: value for key, value in asdict(request).items() if key != "prompt"},
        "dtype": str(number).removeprefix("torch."),
        "fps": fps,
    }
    _check_record(out, record)
    pipe = load(model, number, target)
    if not is_video(pipe):
        raise ValueError(f"VBench is of videos, and {model} ({type(pipe).__name__}) makes images")
    check_request(pipe, request)
    if chosen:
        enable(pipe, chosen)
    pipe.set_progress_bar_config(disable=True)

    whole = set(found.whole)
    every = [(one, index, name) for one in wanted for index, name in enumerate(one.names(samples))]
    todo = [video for video in every if video[-1] not in whole]
    state.wait_for_everyone()  # until all have looked
    if state.is_main_process:
        note(f"{model}: {len(found.whole)} videos are there, {len(todo)} to make")
        if todo:
            write_json(_record(out), {**head("vbench-videos", None), "schema": VIDEOS_SCHEMA, **record})
    mine = todo[state.process_index :: state.num_processes]
    for one, index, name in track(mine, "generate") if state.is_main_process else mine:
        call = replace(request, prompt=one.text, seed=seed + index).arguments(pipe)
        media.save(out / name, media.to_uint8(pipe(**call).frames[0]), fps)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    if json:
        kept = {"videos": out, "made": len(todo), "kept": len(found.whole)}
        print_json({"schema": VIDEOS_SCHEMA, **kept, "processes": state.num_processes, **record})
    else:
        typer.echo(f"{out}: {len(todo)} videos made, {len(found.whole)} kept")


def _record(out: Path) -> Path:
    """What made the videos of a folder; beside it, as VBench expects nothing but videos inside."""
    out = out.absolute()
    return out.with_name(f"{out.name}.json")


def _check_record(out: Path, record: dict[str, Any]) -> None:
    """Refuses to add to videos that were made otherwise.

    Raises:
        ValueError: naming the setting.
    """
    path = opt.check_output(_record(out))
    if not path.exists():
        return
    try:
        earlier = read_json(path)
        same_kind = earlier["schema"] == VIDEOS_SCHEMA
    except (ValueError, KeyError, TypeError):
        same_kind = False
    if not same_kind:
        raise ValueError(
            f"{path}, where it is noted what made the videos, is something else; use another --out"
        )
    check_same(earlier, record, f"the videos in {out} were made", "another --out")


def register(commands: typer.Typer) -> None:
    """Adds the commands of this module."""
    commands.command(epilog=EXAMPLE)(generate)
