"""`dit-accel distill`: a model's attention is trained to a recipe, as an adapter that the recipe loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.generation import Request, check_request, load

from . import options as opt
from .errors import reported
from .output import JsonOption, note, print_json, print_table

SCHEMA = "dit-accel/distill/1"
EXAMPLE = (
    "Example: dit-accel distill --model tiny-flux --recipe tiny-flux-clear --prompts prompts.txt "
    "--steps 600 --out outputs/clear"
)


@reported
def distill(
    model: opt.ModelOption,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A preset's name or a recipe file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the adapter to write.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What the model draws for itself; repeat it for several."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with a prompt on each line.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="In place of prompts a folder of images or videos with captions: metadata.jsonl, or a.txt "
            "beside a.png.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            max=opt.MOST_SAMPLES,
            help="How many; without, one of each prompt, or all files.",
        ),
    ] = None,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    sampling_steps: Annotated[
        int | None, typer.Option("--sampling-steps", min=1, max=10_000, help="Denoising steps of a run.")
    ] = None,
    guidance: opt.GuidanceOption = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=opt.MOST_SAMPLES, help="Steps of training.")
    ] = 1000,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=opt.MOST_SAMPLES, help="Samples of a step, of all processes.")
    ] = 4,
    at_once: Annotated[
        int, typer.Option("--at-once", min=1, max=opt.MOST_SAMPLES, help="Samples of one forward pass.")
    ] = 1,
    rank: Annotated[int, typer.Option("--rank", min=1, max=opt.MOST_SAMPLES, help="Of the LoRA.")] = 16,
    whole: Annotated[
        bool, typer.Option("--whole/--lora", help="Train whole weights of the projections, or LoRA.")
    ] = False,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="adamw, or prodigy, which finds its rate (prodigyopt).")
    ] = "adamw",
    rate: Annotated[
        float | None, typer.Option("--rate", help="Learning rate; 1e-4 without, and 1 for Prodigy.")
    ] = None,
    average: Annotated[
        float, typer.Option("--average", help="Of the exponential average of the weights; 0: none.")
    ] = 0.99,
    flow: Annotated[float, typer.Option("--flow", help="Weight of the flow's own loss.")] = 1.0,
    prediction: Annotated[
        float, typer.Option("--prediction", help="Weight of the distance to the teacher's prediction.")
    ] = 0.5,
    attention: Annotated[
        float, typer.Option("--attention", help="Weight of the distance to its attention outputs.")
    ] = 0.5,
    taps: Annotated[
        str | None,
        typer.Option("--taps", help="Layers of those outputs, with commas; without, every fourth one."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option("--train", help="Projections to train, with commas; without, as the pattern says."),
    ] = None,
    levels: Annotated[
        str, typer.Option("--levels", help="Noise levels: scheduler, as it spreads its steps; or uniform.")
    ] = "scheduler",
    empty: Annotated[
        float, typer.Option("--empty", help="Share of samples with the empty prompt in place of theirs.")
    ] = 0.1,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="bf16: mixed; fp32; or auto: bf16 where the device multiplies it. Weights are fp32.",
        ),
    ] = "auto",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Save memory, compute blocks twice.")
    ] = False,
    held_out: Annotated[
        int | None,
        typer.Option(
            "--held-out", min=0, max=opt.MOST_SAMPLES, help="Samples to measure on; a sixteenth without."
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option("--save-every", min=1, max=opt.MOST_SAMPLES, help="Steps between checkpoints.")
    ] = 100,
    log: Annotated[Path | None, typer.Option("--log", help="Folder of a log for TensorBoard.")] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder of samples and checkpoints; beside --out unless given."),
    ] = None,
    seed: Annotated[int, opt.seed_option("Seed of all draws.")] = 0,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Train a model's attention to a recipe, with the untouched model as teacher; writes an adapter.

    The model draws its own samples from prompts, or takes those of a folder; they are encoded once and kept.
    Beside --out a recipe that names the adapter is written, .yaml. Stopped, it goes on with the same command.
    Several processes: `accelerate launch -m dit_accel distill ...`.
    """
    from dataclasses import replace

    from dit_accel import distill as learn
    from dit_accel.distillation.run import precision_of, state_beside
    from dit_accel.distillation.settings import Settings
    from dit_accel.files import write_text
    from dit_accel.recipe.recipe import resolve
    from dit_accel.recipe.yaml_text import to_yaml

    settings = Settings(
        steps=steps,
        batch=batch,
        at_once=at_once,
        rank=None if whole else rank,
        optimizer=optimizer,
        rate=rate,
        average=average,
        flow=flow,
        prediction=prediction,
        attention=attention,
        taps=_names(taps),
        train=_names(train),
        levels=levels,
        empty=empty,
        precision=precision,
        checkpointing=checkpointing,
        samples=samples,
        held_out=held_out,
        seed=seed,
        save_every=save_every,
    )
    opt.check_guidance(guidance)
    if out.exists() and not out.is_dir():
        raise ValueError(f"`--out` must name a folder, got the file {out}")
    folder = state_beside(out) if state is None else state
    written = out.with_name(f"{out.name}.yaml")
    if written.resolve() == Path(recipe).resolve():
        raise ValueError(f"`--out` {out} would write its recipe over {recipe}, which it reads; name another")
    source = _source(prompt or [], prompts, data)
    asked = resolve(recipe)
    width, height = opt.parse_size(size) or (None, None)
    target, shared = opt.pick_shared_device(device)
    request = Request("", width, height, frames, sampling_steps, guidance).with_defaults(model, "demo")
    pipe = load(model, opt.pick_dtype(dtype, target), target)
    pipe.set_progress_bar_config(disable=True)
    request = request.with_steps(pipe)
    check_request(pipe, request)
    unused = ("prompt", "generator", "output_type")
    call = {name: value for name, value in request.arguments(pipe).items() if name not in unused}
    main = shared.is_main_process
    if main:
        numbers = precision_of(settings, target, folder)
        steps_of = f"{settings.steps} steps of {settings.batch} in {numbers}"
        note(f"{model}: {steps_of}; goes on from {folder} when stopped")
    places = {"call": call, "folder": folder, "log": log, "progress": sys.stderr.isatty()}
    said = learn(pipe, asked, source, out, **places, **settings.about(), save_every=save_every)
    if not main:
        return None
    plain = replace(asked, name="", source="", adapter=None).to_dict()
    write_text(written, to_yaml({**plain, "adapter": out.name}))
    files = {"adapter": out, "recipe": written}
    if json:
        return print_json({"schema": SCHEMA, **said, "files": files})
    rows = [(name, said[name]) for name in ("error_without", "error") if name in said]
    if rows:
        print_table("Distance to the teacher on held-out samples, mean squared", ("", "value"), rows)
    for name, place in files.items():
        typer.echo(f"{name}: {place}")
    return None


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names with commas between them."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _source(given: list[str], file: Path | None, data: Path | None) -> list[str] | Path:
    """Prompts, or a folder that is one.

    Raises:
        ValueError: neither, both, or no such folder.
    """
    from dit_accel.distillation.folders import read_folder
    from dit_accel.evals.metrics import prompts as prompt_file

    if data is not None:
        if given or file is not None:
            raise ValueError("give prompts, by --prompt or --prompts FILE, or a folder, by --data; not both")
        read_folder(data)
        return data
    texts = [*given, *([] if file is None else prompt_file.read(file))]
    if not texts:
        raise ValueError("give what to train on: --prompts FILE, --prompt TEXT, or --data FOLDER")
    return texts


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog=EXAMPLE)(distill)
