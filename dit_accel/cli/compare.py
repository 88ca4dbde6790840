"""`dit-accel compare`: dense and accelerated from the same seed, side by side, with what it saved."""

from __future__ import annotations

from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.generation import (
    DENSE,
    Request,
    Run,
    attempt,
    build_masks,
    by_name,
    check_request,
    is_video,
    load,
)
from dit_accel.json_files import write_json

from . import options as opt
from .errors import reported
from .output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel.recipe.recipe import Recipe

SCHEMA = "dit-accel/compare/1"
EXAMPLE = (
    "Example: dit-accel compare --model tiny-wan --recipe tiny-wan-neighborhood --out both.gif "
    '--prompt "a fox moving left at the center on a blue striped background"'
)


@reported
def compare(
    model: opt.ModelOption,
    prompt: opt.PromptOption,
    recipe: Annotated[
        list[str],
        typer.Option(
            "--recipe", "-r", help="A preset's name or a recipe file; repeat it to compare several."
        ),
    ],
    quantization: opt.QuantizationOption = None,
    size: opt.SizeOption = None,
    frames: opt.FramesOption = None,
    steps: opt.StepsOption = None,
    guidance: opt.GuidanceOption = None,
    seed: opt.SeedOption = 0,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, max=10_000, help="Timed runs of each, taken in turn: A B A B.")
    ] = 1,
    fps: Annotated[int, typer.Option("--fps", min=1, max=1000, help="Frames per second of a video.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="PNG for an image; MP4, GIF or PNG for a video. The report stands beside it, as .json.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Generate dense and accelerated from the same seed; write both side by side, with a JSON report.

    Dense is the untouched pipeline with PyTorch's scaled_dot_product_attention. Every method is warmed up
    first, so building masks and compiling is reported apart. Bundled models start at their demo size, where
    attention is a large part of the work; other models at their pipeline's own default.
    """
    from dit_accel import accelerated, media
    from dit_accel.environment import command_line, environment
    from dit_accel.recipe.recipe import resolve

    width, height = opt.parse_size(size) or (None, None)
    opt.check_guidance(guidance)
    if out is not None:
        opt.check_output(out)
    recipes = by_name([opt.with_quantization(resolve(text), quantization) for text in recipe])
    target = opt.pick_device(device)
    number = opt.pick_dtype(dtype, target)

    request = Request(prompt, width, height, frames, steps, guidance, seed).with_defaults(model, "demo")
    pipe = load(model, number, target)
    request = request.with_steps(pipe)
    check_request(pipe, request)
    path = media.check_suffix(out or Path("compare.mp4" if is_video(pipe) else "compare.png"), is_video(pipe))
    mask_seconds = {DENSE: None}
    for (
        name,
        chosen,
    ) in recipes.items():  # one that does not fit this model and size is refused before any work
        with accelerated(pipe, chosen):
            mask_seconds[name] = build_masks(pipe, request)

    methods: dict[str, Recipe | None] = {DENSE: None, **recipes}
    results = _measure(pipe, request, methods, repeats)
    dense = results[DENSE]
    for name, result in results.items():
        result["mask_seconds"] = mask_seconds[name]
        result["speedup"] = dense["seconds"] / result["seconds"]
        result["step_speedup"] = dense["step_seconds_median"] / result["step_seconds_median"]
    pictures = {name: result.pop("frames") for name, result in results.items()}
    _, picture_height, picture_width, _ = pictures[DENSE].shape
    settings = {
        "model": model,
        "pipeline": type(pipe).__name__,
        "prompt": prompt,
        "width": picture_width,
        "height": picture_height,
        "frames": len(pictures[DENSE]),
        "steps": len(dense["step_seconds"]),
        "guidance": request.guidance,
        "seed": seed,
        "device": str(target),
        "dtype": str(number).removeprefix("torch."),
        "repeats": repeats,
    }
    report_path = path.with_suffix(".json")
    report = {
        "schema": SCHEMA,
        "command": command_line(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "settings": settings,
        "methods": [
            {"name": name, **result, **_fidelity(name, pictures)} for name, result in results.items()
        ],
        "files": {"picture": path, "report": report_path},
    }
    labels = [_label(method) for method in report["methods"]]
    media.save(path, media.side_by_side(list(pictures.values()), labels), fps)
    write_json(report_path, report)
    if json:
        return print_json(report)
    _print_report(report)
    return None


def _measure(
    pipe: DiffusionPipeline, request: Request, methods: dict[str, Recipe | None], repeats: int
) -> dict[str, dict[str, Any]]:
    """Runs every method in turn `repeats` times, each after a warm-up: all but quality and speed-up."""
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for turn, (name, recipe) in product(range(repeats), methods.items()):
        note(f"{name}: run {turn + 1} of {repeats}, {request.steps} steps")
        done = attempt(pipe, request, recipe, name)
        runs[name].append(done.run)
        about = {"recipe": recipe and recipe.to_dict(), "warm_up_seconds": done.warm_up_seconds}
        results.setdefault(name, about | done.densities)
    for name, taken in runs.items():
        results[name] |= {
            "seconds": median(run.seconds for run in taken),
            "step_seconds_median": median(run.median_step_seconds for run in taken),
            "first_step_seconds": median(run.first_step_seconds for run in taken),
            "step_seconds": list(taken[-1].step_seconds),
            "frames": taken[-1].frames,
        }
    return results


def _fidelity(name: str, pictures: dict[str, Any]) -> dict[str, Any]:
    """PSNR and SSIM against dense; PSNR is null where the two are identical."""
    from dit_accel.evals.metrics.fidelity import SSIM_WINDOW, psnr, ssim

    if name == DENSE:
        return {"identical": True, "psnr_db": None, "ssim": 1.0}
    test, reference = pictures[name], pictures[DENSE]
    fits = min(test.shape[1:3]) >= SSIM_WINDOW
    return {
        "identical": bool((test == reference).all()),
        "psnr_db": psnr(test, reference),
        "ssim": ssim(test, reference) if fits else None,
    }


def _label(method: dict[str, Any]) -> str:
    per_step = f"{method['step_seconds_median']:.3g} s per step"
    if method["name"] == DENSE:
        return f"dense\n{per_step}, {method['seconds']:.3g} s in all\nevery pair computed"
    total = f"{method['seconds']:.3g} s in all ({method['speedup']:.2f}x)"
    return f"{method['name']}\n{per_step}, {total}\n{method['run_density']:.0%} of pairs computed"


def _number(value: float | None, pattern: str, missing: str = "") -> str:
    return missing if value is None else format(value, pattern)


def _print_report(report: dict[str, Any]) -> None:
    columns = (
        "method",
        "s/step",
        "speed-up",
        "s in all",
        "speed-up",
        "density",
        "blocks",
        "run",
        "PSNR dB",
        "SSIM",
    )
    rows = [
        (
            method["name"],
            f"{method['step_seconds_median']:.3f}",
            f"{method['step_speedup']:.2f}x",
            f"{method['seconds']:.2f}",
            f"{method['speedup']:.2f}x",
            _number(method["pattern_density"], ".3f"),
            _number(method["block_density"], ".3f"),
            _number(method["run_density"], ".3f"),
            "identical" if method["identical"] else _number(method["psnr_db"], ".1f"),
            _number(method["ssim"], ".3f"),
        )
        for method in report["methods"]
    ]
    settings, hardware = report["settings"], report["environment"]
    frames = f", {settings['frames']} frames" if settings["frames"] > 1 else ""
    device = hardware["gpus"][0]["name"] if settings["device"].startswith("cuda") else hardware["cpu"]["name"]
    title = (
        f"{settings['model']}, {settings['width']}x{settings['height']}{frames}, {settings['steps']} steps, "
        f"{settings['dtype']}, {device}, torch {hardware['packages']['torch']}"
    )
    print_table(title, columns, rows)
    built = ", ".join(f"{m['name']} {m['mask_seconds']:.2f} s" for m in report["methods"] if m["recipe"])
    typer.echo(f"masks, once per size: {built}")
    typer.echo(f"{report['files']['picture']}\n{report['files']['report']}")


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog=EXAMPLE)(compare)
