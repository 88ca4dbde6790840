"""`dit-accel eval sweep`: recipes against dense, one row per setting with its speed and its quality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.errors import UnavailableError
from dit_accel.evals.metrics import prompts as prompt_file
from dit_accel.generation import DENSE, Request, build_masks, by_name, check_request, is_video, load

from . import options as opt
from . import results as res
from .errors import reported
from .output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_accel.evals.sweep.runner import Sweep
    from dit_accel.recipe.recipe import Recipe
    from dit_accel.scorers.pretrained import Sources

SAMPLES = 8  # held-out captions
FIDELITY = "psnr,ssim,lpips"
BUNDLED = f"{FIDELITY},attributes,frechet-scenes,kid-scenes"
SEEDS = 1000  # prompts that one --seed has noise for, as in `eval attributes`
PACKAGES = ("dit-accel", "torch", "triton", "diffusers", "transformers")
EXAMPLE = (
    "Example: dit-accel eval sweep --model tiny-flux --recipes tiny-flux-clear mine.yaml -n 8 "
    "--out outputs/sweep/tiny-flux"
)


@reported
def sweep(
    model: opt.ModelOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; a stopped sweep goes on.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            "--recipes",
            help="A preset's name or a recipe file; several may follow. Without it, all presets made for a "
            "bundled model.",
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[RECIPES]...", help="More recipes.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with a prompt on each line.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--samples",
            min=1,
            max=SEEDS,
            help=f"Held-out captions of a bundled model, {SAMPLES} unless given.",
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo/--native", help="Size of a bundled model; speed needs the larger one.")
    ] = True,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    steps: opt.StepsOption = None,
    guidance: opt.GuidanceOption = None,
    seed: Annotated[int, opt.seed_option(f"Prompt i starts from noise {SEEDS} * seed + i.")] = 0,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, max=10_000, help="Timed runs of each prompt.")
    ] = 1,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", help=f"{BUNDLED}, fid, ...: see `eval list`. Default: what applies."),
    ] = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    fps: Annotated[int, typer.Option("--fps", min=1, max=1000, help="Frames per second of a video.")] = 8,
    weights: res.WeightsOption = None,
    allow_download: res.DownloadOption = False,
    allow_skipped: res.SkippedOption = False,
    cache: res.CacheOption = None,
    no_cache: res.NoCacheOption = False,
    plot: Annotated[
        bool, typer.Option("--plot/--no-plot", help="Draw quality against speed, with matplotlib.")
    ] = True,
    label: res.LabelOption = None,
    json: JsonOption = False,
) -> None:
    """Generate and evaluate every recipe against dense: speed, memory, density and quality, a row each.

    For each prompt the settings run in turn, each after a warm-up. --out then holds sweep.json, sweep.csv,
    sweep.md and sweep.png, every run in runs.json, and what was generated, without loss, in media/.
    """
    from dit_accel.environment import environment
    from dit_accel.evals.benchmarks import memory
    from dit_accel.evals.sweep import report as sweep_report
    from dit_accel.evals.sweep.rows import Judges, judge
    from dit_accel.evals.sweep.runner import Sweep
    from dit_accel.pipelines import tiny
    from dit_accel.plots import check_plot

    if out.exists() and not out.is_dir():
        raise ValueError(f"`--out` must be a folder, got the file {out}")
    files = {suffix: out / f"{sweep_report.NAME}.{suffix}" for suffix in sweep_report.SUFFIXES}
    without: dict[str, str] = {}
    if plot:
        try:
            check_plot(files["png"], ", or do without (--no-plot)")
        except UnavailableError as error:
            if not allow_skipped:
                raise
            plot, without = False, {"plot": str(error)}
    width, height = opt.parse_size(size) or (None, None)
    opt.check_guidance(guidance)
    bundled = model in tiny.NAMES
    recipes = _recipes(model, [*(recipe or []), *(more or [])])
    texts = _prompts(model, prompts, samples, seed)
    request = Request("", width, height, frames, steps, guidance)
    request = request.with_defaults(model, "demo" if demo else "native")
    requests = [replace(request, prompt=text, seed=SEEDS * seed + i) for i, text in enumerate(texts)]
    sources, target = res.pick_sources(weights, allow_download), opt.pick_device(device)
    number = opt.pick_dtype(dtype, target)
    names, skipped = _metrics(metrics, requests, bundled, sources, allow_skipped)
    judges = Judges.prepare(names, sources, target)

    here = environment()
    pipe = load(model, number, target)
    check_request(pipe, request)
    runner = Sweep(
        folder=out,
        methods={DENSE: None, **recipes},
        requests=[request.with_steps(pipe) for request in requests],
        repeats=repeats,
        suffix=".mp4" if is_video(pipe) and request.frames != 1 else ".png",
        about={"model": model, **_about(pipe, number, target, here)},
        fps=fps,
        commit=here["commit"],
    )
    _announce(pipe, runner)
    runs = runner.run(pipe, res.track)
    judged = judge(runner, runs, judges, res.pick_store(cache, no_cache), res.track)
    answer = {
        **res.head("sweep", label or Path(model).name),
        "settings": runner.settings,
        "picture": runner.picture(),
        "memory": memory.describe(target),
        **vars(judged),
        "skipped": skipped | without,
        "files": {suffix: path.name for suffix, path in files.items() if plot or suffix != "png"},
    }
    sweep_report.write(answer, out)
    if json:
        return print_json(answer)
    print_table(sweep_report.title(answer), *sweep_report.columns(answer))
    for line in sweep_report.notes(answer):
        typer.echo(line)
    return typer.echo("\n".join(str(out / name) for name in answer["files"].values()))


def _recipes(model: str, given: list[str]) -> dict[str, Recipe]:
    """The recipes by name; all presets of a bundled model if none is given."""
    from dit_accel.pipelines import tiny
    from dit_accel.recipe.recipe import presets, resolve

    if not given and model in tiny.NAMES:
        given = [name for name in presets() if name.startswith(f"{model}-")]
    if not given:
        raise typer.BadParameter("give `--recipe`: presets are made for bundled models only")
    return by_name([resolve(text) for text in given])


def _prompts(model: str, file: Path | None, samples: int | None, seed: int) -> list[str]:
    """The lines of a file, or held-out captions of a bundled model."""
    from dit_accel.pipelines import tiny
    from dit_accel.pipelines.tiny.evaluate import held_out_scenes

    if file is not None and samples is not None:
        raise typer.BadParameter("give either `--prompts` or `-n`")
    if file is not None:
        texts = prompt_file.read(file)
        if not 1 <= len(texts) <= SEEDS:
            raise ValueError(f"`--prompts`: {file} must hold 1 to {SEEDS} prompts, got {len(texts)}")
        return texts
    if model not in tiny.NAMES:
        raise typer.BadParameter("give `--prompts`: captions are known for bundled models only")
    info = tiny.INFO[model]
    scenes = held_out_scenes(samples or SAMPLES, seed, info.video)
    return [tiny.caption(scene) for scene in scenes]


def _metrics(
    text: str | None, requests: list[Request], bundled: bool, sources: Sources, allow_skipped: bool
) -> tuple[list[str], dict[str, str]]:
    """The metrics that will run, and why others do not.

    Raises:
        ValueError: one that was asked for by name and does not apply.
        UnavailableError: one that cannot run here and may not be skipped.
    """
    from dit_accel.evals.metrics.catalogue import available
    from dit_accel.evals.sweep.rows import COMMANDS, unfit

    names = res.pick_metrics(text or (BUNDLED if bundled else FIDELITY), "sweep", COMMANDS)
    reasons = unfit(names, requests, bundled)
    if reasons and text is not None:
        raise ValueError(f"`--metrics`: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}")
    names, missing = available([name for name in names if name not in reasons], sources, allow_skipped)
    return names, reasons | missing


def _about(
    pipe: DiffusionPipeline, dtype: torch.dtype, device: torch.device, here: dict[str, Any]
) -> dict[str, Any]:
    """What times and outputs depend on beside model, prompts and recipes."""
    from dit_accel.evals.benchmarks.table import machine

    return {
        "pipeline": type(pipe).__name__,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine(here, device.type),
        "packages": {name: here["packages"][name] for name in PACKAGES},
    }


def _announce(pipe: DiffusionPipeline, runner: Sweep) -> None:
    """Says what is to run; a recipe that does not fit this model and size is refused before any of it."""
    from dit_accel import accelerated

    kept = runner.kept()
    missing = runner.missing(kept)
    note(f"{runner.folder}: {len(kept)} runs are there, {len(missing)} to make")
    for name in dict.fromkeys(name for _, _, name in missing if name != DENSE):
        with accelerated(pipe, runner.methods[name]):
            build_masks(pipe, runner.requests[0])


def register(evaluations: typer.Typer) -> None:
    """Adds the commands of this module."""
    evaluations.command(epilog=EXAMPLE)(sweep)
