"""`dit-accel eval scores`: images and videos on disk by what trained models think of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import results as res
from .errors import reported
from .option_groups import Judging, grouped
from .options import pick_device

EXAMPLE = (
    "Example: dit-accel eval scores --test outputs/sweep/media/dense --prompts outputs/sweep/sweep.json "
    "--metrics clip,pickscore --out dense.json"
)


@reported
@grouped
def scores(
    test: res.TestOption,
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
    frames: res.FramesChoice = "all",
    *,
    judging: Judging,
) -> None:
    """Score every image or video alone: CLIP, PickScore, HPSv2, aesthetics, ImageReward, TOPIQ.

    A video scores the mean over its frames. All but aesthetics and topiq judge by the prompt: every file
    needs one, and every prompt a file. The mean has a 95% bootstrap interval over the files.
    """
    from dit_accel.evals.metrics import scores as evaluation
    from dit_accel.evals.metrics.bootstrap import BOOTSTRAP
    from dit_accel.evals.metrics.catalogue import METRICS, available
    from dit_accel.evals.metrics.folders import Folder, check_frames
    from dit_accel.evals.metrics.prompts import of_files

    names = res.pick_metrics(metrics, "scores")
    needy = [name for name in names if METRICS[name].prompt]
    if needy and prompts is None:
        raise typer.BadParameter(f"{', '.join(needy)} judge by the prompt: give `--prompts`")
    check_frames(frames)
    sources, target = judging.sources(), pick_device(judging.device)
    folder = Folder.open(test)
    texts = of_files(prompts, folder.names) if prompts is not None else {}
    names, skipped = available(names, sources, judging.allow_skipped)
    evaluation.check(folder, frames, res.track)
    ready = evaluation.prepare(names, sources, target)
    store = judging.store()
    rows = evaluation.measure(folder, ready, texts, frames=frames, store=store, track=res.track)
    answer = {
        "test": test,
        "prompts": prompts,
        "frames": frames,
        "bootstrap": BOOTSTRAP,
        "metrics": evaluation.summarise(rows, ready),
        "files": rows,
        "skipped": skipped,
        "warnings": evaluation.cut_warnings(ready, texts),
    }
    judging.give("scores", answer)


def register(evaluations: typer.Typer) -> None:
    """Adds the commands of this module."""
    evaluations.command(epilog=EXAMPLE)(scores)
