"""`dit-accel eval vbench generate`: the videos that VBench scores, by one process or several."""

from __future__ import annotations

import json as jsons
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..records import check_same, write_json
from ..runs import Request, check_request, is_video, load
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
    check_output,
    parse_size,
    pick_dtype,
    pick_shared_device,
)
from .output import JsonOption, note, print_json
from .results import head, track
from .vbench_options import (
    START,
    DimensionsOption,
    PromptsOption,
    PythonOption,
    SamplesOption,
    pick_dimensions,
    pick_prompts,
)

VIDEOS_SCHEMA = "dit-accel/vbench-videos/1"
EXAMPLE = f"{START} generate -m tiny-wan -r tiny-wan-radial --prompts prompts.txt --out videos/"


@reported
def generate(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the videos; {FOLDER}.json beside it.")],
    prompts: PromptsOption = None,
    vbench_python: PythonOption = None,
    dimensions: DimensionsOption = None,
    samples: SamplesOption = None,
    recipe: RecipeOption = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Video i starts from the noise seed + i.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    fps: Annotated[int, typer.Option("--fps", min=1, help="Frames per second.")] = 8,
    json: JsonOption = False,
) -> None:
    """Generate the videos that VBench scores: 5 per prompt, 25 of the prompts for temporal flickering.

    Whole videos that are in --out stay, so a run that was stopped goes on. Several processes share the work
    when started by `accelerate launch --multi_gpu -m dit_accel.cli eval vbench generate ...`; who makes a
    video does not change it.
    """
    from .. import enable
    from ..evals import media
    from ..evals.vbench import find
    from ..recipe import resolve

    width, height = parse_size(size) or (None, None)
    check_guidance(guidance)
    chosen = resolve(recipe) if recipe else None
    wanted = pick_prompts(prompts, vbench_python, pick_dimensions(dimensions))
    found = find(out, wanted, samples)
    target, state = pick_shared_device(device)
    number = pick_dtype(dtype, target)
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
    path = check_output(_record(out))
    if not path.exists():
        return
    try:
        earlier = jsons.loads(path.read_text())
        same_kind = earlier["schema"] == VIDEOS_SCHEMA
    except (OSError, ValueError, KeyError, TypeError):
        same_kind = False
    if not same_kind:
        raise ValueError(
            f"{path}, where it is noted what made the videos, is something else; use another --out"
        )
    check_same(earlier, record, f"the videos in {out} were made", "another --out")


def register(commands: typer.Typer) -> None:
    commands.command(epilog=EXAMPLE)(generate)
