"""`dit-accel eval pairs | dist`: metrics of images and videos on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import results as res
from .errors import reported
from .option_groups import Judging, grouped
from .options import check_output, pick_device

if TYPE_CHECKING:
    from dit_accel.evals.metrics.folders import Folder
    from dit_accel.evals.metrics.sets import Statistics

PAIRS_EXAMPLE = "Example: dit-accel eval pairs --test radial/ --ref dense/ --metrics psnr,lpips --out a.json"
DIST_EXAMPLE = (
    "Example: dit-accel eval dist --test radial/ --ref photos/ --metrics fid,kid --save-stats photos.npz"
)


@reported
@grouped
def pairs(
    test: res.TestOption,
    ref: Annotated[Path, typer.Option("--ref", help="Folder of what they should look like, named alike.")],
    metrics: Annotated[str, typer.Option("--metrics", help="psnr, ssim, ms_ssim, lpips.")] = "psnr,ssim",
    frames: res.FramesChoice = "all",
    *,
    judging: Judging,
) -> None:
    """Compare images or videos with references of the same file names: PSNR, SSIM, MS-SSIM, LPIPS.

    Every file needs a partner of the same name, size and number of frames.
    """
    from dit_accel.evals.metrics import pairs as evaluation
    from dit_accel.evals.metrics.catalogue import available
    from dit_accel.evals.metrics.folders import Folder, check_frames

    names = res.pick_metrics(metrics, "pairs")
    check_frames(frames)
    sources = judging.sources()
    ours, theirs = Folder.open(test), Folder.open(ref)
    evaluation.match(ours, theirs)
    names, skipped = available(names, sources, judging.allow_skipped)
    ready = evaluation.prepare(names, sources, pick_device(judging.device))
    store = judging.store()
    rows = evaluation.measure(ours, theirs, ready, frames=frames, store=store, track=res.track)
    answer = {
        "test": test,
        "reference": ref,
        "frames": frames,
        "metrics": evaluation.summarise(rows, ready),
        "pairs": rows,
        "skipped": skipped,
        "warnings": evaluation.one_colour_warnings(rows),
    }
    judging.give("pairs", answer)


@reported
@grouped
def dist(
    test: res.TestOption,
    ref: Annotated[
        Path | None, typer.Option("--ref", help="Folder of images or videos to compare with.")
    ] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Instead of --ref: a file that --save-stats wrote.")
    ] = None,
    metrics: Annotated[
        str,
        typer.Option("--metrics", help="fid, kid, prdc, cmmd, frechet-scenes, ...: see `eval list`."),
    ] = "frechet-scenes,kid-scenes,prdc-scenes",
    frames: res.FramesChoice = "middle",
    resize: Annotated[
        str, typer.Option("--resize", help="For InceptionV3: clean (as clean-fid) or legacy (its own).")
    ] = "clean",
    save_stats: Annotated[
        Path | None, typer.Option("--save-stats", help="Write the reference's statistics to this .npz file.")
    ] = None,
    *,
    judging: Judging,
) -> None:
    """Compare a folder with another as a set: Fréchet distance, KID, MMD, precision and recall.

    The default metrics use the bundled scene encoder, which needs no download and knows the bundled scenes
    only; they are not FID. `fid`, `kid`, `prdc` and `cmmd` are the published ones and need weights.
    """
    from dit_accel.evals.metrics import sets
    from dit_accel.evals.metrics.catalogue import METRICS, available
    from dit_accel.evals.metrics.features import EXTRACTORS, RESIZES
    from dit_accel.evals.metrics.folders import Folder, check_frames

    names = res.pick_metrics(metrics, "dist")
    if (ref is None) == (stats is None):
        raise typer.BadParameter("give either `--ref` or `--stats`")
    if save_stats and stats:
        raise typer.BadParameter("`--save-stats` writes what `--ref` has, and `--stats` is written already")
    if resize not in RESIZES:
        raise typer.BadParameter(f"`--resize` must be {' or '.join(RESIZES)}, got {resize!r}")
    extractors = list(dict.fromkeys(METRICS[name].extractor for name in names))
    if len(extractors) > 1 and (stats or save_stats):
        raise typer.BadParameter(f"statistics are of one extractor, `--metrics` need {', '.join(extractors)}")
    check_frames(frames)
    if save_stats is not None:
        check_output(save_stats)
    if save_stats is not None and save_stats.suffix != ".npz":
        raise ValueError(f"`--save-stats` must end in .npz, got {save_stats.name!r}")
    ours = Folder.open(test)
    theirs: Folder | Statistics = Folder.open(ref) if ref is not None else sets.Statistics.load(stats)
    sources, target = judging.sources(), pick_device(judging.device)
    names, skipped = available(names, sources, judging.allow_skipped)

    options = {"frames": frames, "store": judging.store(), "track": res.track}
    lines = sets.jpeg_warnings(*(side for side in (ours, theirs) if isinstance(side, Folder)))
    found = []
    for kind in extractors:
        chosen = [name for name in names if METRICS[name].extractor == kind]
        if chosen:
            extractor = EXTRACTORS[kind](sources, target, resize)
            found.append(sets.compare(chosen, ours, theirs, extractor, **options))
    if save_stats is not None:
        found[0].reference.save(save_stats)
    answer = {
        "test": test,
        "reference": ref or stats,
        "frames": frames,
        "metrics": {name: value for one in found for name, value in one.metrics.items()},
        "features": [one.features for one in found],
        "skipped": skipped,
        "warnings": lines + [line for one in found for line in one.warnings],
    }
    judging.give("dist", answer)


def register(evaluations: typer.Typer) -> None:
    """Adds the commands of this module."""
    evaluations.command(epilog=PAIRS_EXAMPLE)(pairs)
    evaluations.command(epilog=DIST_EXAMPLE)(dist)
