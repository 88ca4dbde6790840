"""What a head search is worth: `python -m dit_accel.evals.reports.hunt_compare tiny-sd3 outputs/hunt`.

On prompt-seed pairs that the search did not use, with the pipeline's arguments of the search: no guidance,
guidance by the heads that were found, and PAG of a whole layer, over one grid of scales w. A layer's PAG runs
as many blocks more as guidance by any heads from that layer on, so PAG of the first layer with a found head
costs the same; calls of blocks are counted. Per row the share of right attributes, the probability that the
bundled scene encoder gives them (the objectives `attributes` and `scenes`), and the Fréchet distance to
drawings of the same scenes in the encoder's features, with 95% bootstrap intervals of the means and of the
changes from no guidance on the same pairs.

The rows go to `evals/results/hunt-MODEL.csv` and `.md`, and the search's heads and pictures beside them;
images and scores are kept in the search's folder, so a comparison that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import media
from dit_accel.evals.benchmarks import table
from dit_accel.evals.metrics.bootstrap import interval, mean_interval, resamples
from dit_accel.evals.metrics.distribution import frechet
from dit_accel.evals.metrics.features import Scenes
from dit_accel.files import atomic, write_text
from dit_accel.guidance import HeadPerturbation
from dit_accel.guidance.hunter import FOUND, LOG
from dit_accel.guidance.objectives import BUNDLED, named
from dit_accel.guidance.trials import Pair, Trials
from dit_accel.json_files import read_json
from dit_accel.scorers.pretrained import Sources

SCALES = (1.0, 2.0, 4.0, 8.0)
NONE, HUNTED = "none", "found heads"
KEPT = "compare"  # folder of images and scores, in the search's
FRECHET_RESAMPLES = 200
Features = Callable[[Sequence[np.ndarray]], torch.Tensor]  # of uint8 pictures


def methods(
    found: HeadPerturbation, layers: Sequence[int], scales: Sequence[float]
) -> list[tuple[str, HeadPerturbation | None]]:
    """What is compared: (name, guidance)."""
    rows: list[tuple[str, HeadPerturbation | None]] = [(NONE, None)]
    rows += [(HUNTED, replace(found, scale=scale)) for scale in scales]
    for layer in layers:
        whole = HeadPerturbation([layer], kind="pag", tokens=found.tokens)
        rows += [(f"PAG layer {layer}", replace(whole, scale=scale)) for scale in scales]
    return rows


def first_layer(found: HeadPerturbation) -> int:
    """The first layer that is perturbed, which decides the cost."""
    return min(entry if isinstance(entry, int) else entry[0] for entry in found.heads)


def block_calls(trials: Trials, guidance: HeadPerturbation | None, pair: Pair) -> int:
    """How many calls of transformer blocks one sample takes."""
    from dit_accel.pipelines import family_of

    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    transformer = trials.pipe.transformer
    blocks = [block for blocks in family_of(transformer).blocks(transformer) for block in blocks]
    hooks = [block.register_forward_pre_hook(count) for block in blocks]
    try:
        trials.generate(guidance, [pair])
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def mean(name: str, scores: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """The mean of per-sample scores (n,), and its change from `plain` (n,) on the same pairs, as `name`."""
    answer = {}
    for key, values in ((name, scores), (f"{name}_change", scores - plain)):
        low, high = mean_interval(values)
        answer |= {key: values.mean(), f"{key}_low": low, f"{key}_high": high}
    return answer


def distance(features: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Fréchet distance of features (n, d) to `reference`, and its change from that of `plain`.

    Resampling adds to a Fréchet distance, and much the same to both: intervals are of the change alone.
    """
    value, before = frechet(features, reference), frechet(plain, reference)
    picks = map(torch.from_numpy, resamples(len(features), FRECHET_RESAMPLES))
    changes = [frechet(features[p], reference) - frechet(plain[p], reference) for p in picks]
    low, high = interval(np.array(changes))
    change = {"frechet_change": value - before, "frechet_change_low": low, "frechet_change_high": high}
    return {"frechet": value, **change}


def compare(
    trials: Trials,
    rows: Sequence[tuple[str, HeadPerturbation | None]],
    pairs: Sequence[Pair],
    features: Features,
    reference: torch.Tensor,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One row per method.

    Args:
        trials: with the objectives.
        rows: of `methods`; the first is without guidance.
        pairs: prompts and seeds.
        features: of pictures.
        reference: features of the reference pictures.
        progress: whether to show a bar on stderr.
    """
    from rich.console import Console
    from rich.progress import track

    plain: dict[str, Any] = {}
    answer = []
    for name, guidance in rows:
        label = name if guidance is None else f"{name}, w = {guidance.scale:g}"
        batches = track(trials.batches(pairs), label, console=Console(stderr=True), disable=not progress)
        records = [record for batch in batches for record in trials.score(guidance, batch)]
        scores = {one: np.array([record[one] for record in records]) for one in trials.objectives}
        calls = block_calls(trials, guidance, pairs[0])
        found = features([trials.image(guidance, pair) for pair in pairs])
        plain = plain or {"scores": scores, "calls": calls, "features": found}
        row = {
            "method": name,
            "scale": 0.0 if guidance is None else guidance.scale,
            "n": len(pairs),
            "block_calls": calls,
            "extra_cost": calls / plain["calls"] - 1,
        }
        for one in trials.objectives:
            row |= mean(one, scores[one], plain["scores"][one])
        answer.append(row | distance(found, plain["features"], reference))
    return answer


def markdown(model: str, rows: Sequence[dict[str, Any]], objectives: Iterable[str], about: str) -> str:
    """The table of a model."""

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"

    means = [key for name in objectives for key in (name, f"{name}_change")]
    titles = ["change" if key.endswith("_change") else key for key in means]
    headings = ["guidance", "w", "extra cost", *titles, "Fréchet distance", "change"]
    lines = [
        [
            row["method"],
            f"{row['scale']:g}",
            f"{row['extra_cost']:.3f}",
            *(cell(row, key) for key in means),
            f"{row['frechet']:.3f}",
            cell(row, "frechet_change"),
        ]
        for row in rows
    ]
    return f"# Head search on {model}\n\n{about}\n\n{table.markdown(headings, lines)}"


def held_out_pairs(n: int, seed: int, used: Sequence[Sequence[Any]], model: str) -> tuple[list[Pair], list]:
    """Captions of held-out scenes with seeds of their own, and the scenes.

    Raises:
        ValueError: a pair that the search used.
    """
    from dit_accel.pipelines.tiny import INFO, caption
    from dit_accel.pipelines.tiny.evaluate import held_out_scenes

    scenes = held_out_scenes(n, seed, INFO[model].video)
    pairs = [Pair(caption(scene), 1000 * seed + i) for i, scene in enumerate(scenes)]
    shared = {tuple(pair) for pair in used} & set(pairs)
    if shared:
        raise ValueError(f"the search used {len(shared)} of these pairs; take another --seed, got {seed}")
    return pairs, scenes


def drawings(scenes: Sequence[Any], height: int, width: int) -> list[np.ndarray]:
    """The scenes as they are meant to look, uint8 (height, width, 3) each."""
    from dit_accel.pipelines.tiny import render

    return [media.to_uint8(render(scene, height, width)[0]) for scene in scenes]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from dit_accel.environment import environment
    from dit_accel.guidance.head_pictures import MAP, SHEET
    from dit_accel.pipelines import load, tiny

    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.reports.hunt_compare", description=__doc__.split("\n")[0]
    )
    known = [name for name, info in tiny.INFO.items() if not info.video]
    parser.add_argument("model", choices=known, help="whose pictures the bundled encoder knows")
    parser.add_argument("hunt", type=Path, help=f"folder of a search, with {LOG} and {FOUND}")
    parser.add_argument("--strength", type=float, help="of the found heads, in place of the search's")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="the grid of w")
    parser.add_argument(
        "--pag-layers", type=int, nargs="+", help="layers for PAG (default: the first with a found head)"
    )
    parser.add_argument("-n", "--samples", type=int, default=256, help="prompt-seed pairs")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and noise")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=table.RESULTS)
    options = parser.parse_args(arguments)
    if options.samples < 2:
        parser.error(f"--samples must be at least 2, got {options.samples}")
    for name in (LOG, FOUND):
        if not (options.hunt / name).is_file():
            parser.error(f"{options.hunt} holds no {name}; search first: dit-accel hunt")
    settings = read_json(options.hunt / LOG)["settings"]
    plain = read_json(options.hunt / FOUND)
    if options.strength is not None:
        plain["strength"] = options.strength
    found = HeadPerturbation.from_dict(plain)

    pairs, scenes = held_out_pairs(options.samples, options.seed, settings["pairs"], options.model)
    pipe = load(options.model)
    pipe.set_progress_bar_config(disable=True)
    call = settings["call"]
    trials = Trials(
        pipe, [named(name) for name in BUNDLED], options.hunt / KEPT, call=call, batch=options.batch
    )
    features = Scenes(Sources(), torch.device("cpu"))
    drawn = features(drawings(scenes, call["height"], call["width"]))
    compared = methods(found, options.pag_layers or [first_layer(found)], options.scales)
    rows = compare(trials, compared, pairs, features, drawn, progress=sys.stderr.isatty())

    here = environment()
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "dit_accel.evals.reports.hunt_compare", *map(str, given)])
    about = (
        f"{len(pairs)} held-out captions, {call['num_inference_steps']} steps, arguments {json.dumps(call)}; "
        f"{len(found.heads)} heads found by {settings['objective']} on {len(settings['pairs'])} other pairs, "
        f"at strength {found.strength:g}. In brackets 95% bootstrap intervals; changes are from no guidance "
        "on the same pairs; the extra cost is counted in calls of blocks. "
        f"`{command}`, {here['cpu']['name']}, torch {here['packages']['torch']}, commit {here['commit']}."
    )
    path = options.out / f"hunt-{options.model}.csv"
    with atomic(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", *rows[0]])
        writer.writeheader()
        writer.writerows({"model": options.model, **row} for row in rows)
    text = markdown(options.model, rows, BUNDLED, about)
    for name in filter(lambda name: (options.hunt / name).is_file(), (MAP, SHEET, FOUND)):
        copy = options.out / f"hunt-{options.model}-{name}"
        shutil.copyfile(options.hunt / name, copy)
        text += (
            f"\n![{copy.stem}]({copy.name})\n" if copy.suffix == ".png" else f"\n[{copy.name}]({copy.name})\n"
        )
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
