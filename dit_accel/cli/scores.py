"""`dit-accel eval scores`: images and videos on disk by what trained models think of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import reported
from .options import DeviceOption, check_output, pick_device
from .output import JsonOption
from .results import (
    CacheOption,
    DownloadOption,
    FramesChoice,
    LabelOption,
    NoCacheOption,
    OutOption,
    SkippedOption,
    TestOption,
    WeightsOption,
    give,
    head,
    pick_metrics,
    pick_sources,
    pick_store,
    track,
)

EXAMPLE = (
    "Example: dit-accel eval scores --test outputs/sweep/media/dense --prompts outputs/sweep/sweep.json "
    "--metrics clip,pickscore --out dense.json"
)


@reported
def scores(
    test: TestOption,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help='JSON: {"a.png": "a cat", ...}, or a sweep\'s sweep.json. Else lines: 000.png has the '
            "first, 001.png the next, as of a sweep, and {line}-0.mp4 that line, as for VBench.",
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics", help="clip, pickscore, hpsv2, aesthetics, image-reward, topiq: see `eval list`."
        ),
    ] = "clip",
    frames: FramesChoice = "all",
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    allow_download: DownloadOption = False,
    allow_skipped: SkippedOption = False,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    label: LabelOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Score every image or video alone: CLIP, PickScore, HPSv2, aesthetics, ImageReward, TOPIQ.

    A video scores the mean over its frames. All but aesthetics and topiq judge by the prompt: every file
    needs one, and every prompt a file. The mean has a 95% bootstrap interval over the files.
    """
    from ..evals import scores as evaluation
    from ..evals.bootstrap import BOOTSTRAP
    from ..evals.folders import Folder, check_frames
    from ..evals.metrics import METRICS, available
    from ..evals.prompts import of_files

    names = pick_metrics(metrics, "scores")
    needy = [name for name in names if METRICS[name].prompt]
    if needy and prompts is None:
        raise typer.BadParameter(f"{', '.join(needy)} judge by the prompt: give `--prompts`")
    check_frames(frames)
    if out is not None:
        check_output(out)
    sources, target = pick_sources(weights, allow_download), pick_device(device)
    folder = Folder.open(test)
    texts = of_files(prompts, folder.names) if prompts is not None else {}
    names, skipped = available(names, sources, allow_skipped)
    evaluation.check(folder, frames, track)
    ready = evaluation.prepare(names, sources, target)
    store = pick_store(cache, no_cache)
    rows = evaluation.measure(folder, ready, texts, frames=frames, store=store, track=track)
    answer = {
        **head("scores", label),
        "test": test,
        "prompts": prompts,
        "frames": frames,
        "bootstrap": BOOTSTRAP,
        "metrics": evaluation.summarise(rows, ready),
        "files": rows,
        "skipped": skipped,
        "warnings": evaluation.cut_warnings(ready, texts),
    }
    give(answer, out, json)


def register(evaluations: typer.Typer) -> None:
    evaluations.command(epilog=EXAMPLE)(scores)
