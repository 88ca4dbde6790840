"""What a sweep shows: one row per setting, its speed and its quality against dense attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from dit_accel import media
from dit_accel.evals.metrics import pairs, sets
from dit_accel.evals.metrics.catalogue import METRICS, of_command
from dit_accel.evals.metrics.features import EXTRACTORS, Extractor
from dit_accel.evals.metrics.fidelity import SSIM_WINDOW
from dit_accel.evals.metrics.folders import Folder, Store, Track, untracked
from dit_accel.generation import DENSE, Request
from dit_accel.scorers.pretrained import Sources

from .runner import MEDIA, Sweep

if TYPE_CHECKING:
    import torch

COMMANDS = ("pairs", "dist", "attributes")  # of `dit-accel eval`, whose metrics a sweep takes
LEAST = {"ssim": SSIM_WINDOW, "ms_ssim": pairs.MS_SSIM_LEAST, "lpips": pairs.LPIPS_LEAST}  # pixels a side
DENSITIES = ("pattern_density", "block_density", "run_density", "run_block_density")
PAIRED = (
    "sets are paired with dense's by prompt and noise, which lowers their distances, kernel distances even "
    "below 0"
)
SPEED = {  # what of a run is timed; the names of its median, and of dense attention's relative to it
    "step_seconds_median": ("step_seconds", "step_speedup"),
    "seconds": ("seconds", "speedup"),
}


def asked(prompts: Sequence[str]) -> list[dict[str, str]]:
    """The attributes that captions of the bundled scenes name.

    Raises:
        ValueError: a prompt that is no such caption, or captions of both images and videos.
    """
    from dit_accel.pipelines.tiny import read_caption

    found = [read_caption(prompt) for prompt in prompts]
    if len({"motion" in attributes for attributes in found}) > 1:
        raise ValueError("some prompts are captions of images, others of videos")
    return found


def unfit(names: Iterable[str], requests: Sequence[Request], bundled: bool) -> dict[str, str]:
    """The metrics that a sweep of such requests cannot have, wherever it runs, and why."""
    sides = [side for side in (requests[0].width, requests[0].height) if side is not None]
    reasons = {}
    for name in names:
        command, least = METRICS[name].command, LEAST.get(name, 0)
        if command == "dist" and len(requests) < 2:
            reasons[name] = "a set needs at least 2 prompts"
        elif command == "attributes" and not bundled:
            reasons[name] = "only what bundled models draw can be checked by rule"
        elif command == "attributes":
            try:
                asked([request.prompt for request in requests])
            except ValueError as error:
                reasons[name] = str(error)
        elif min(sides, default=least) < least:
            reasons[name] = f"it needs at least {least} pixels a side, and pictures have {min(sides)}"
    return reasons


@dataclass(frozen=True)
class Judges:
    """Metrics that are ready to run."""

    pairs: dict[str, pairs.PairMetric]
    sets: list[tuple[Extractor, list[str]]]
    attributes: bool

    @classmethod
    def prepare(cls, names: Sequence[str], sources: Sources, device: torch.device) -> Judges:
        """Loads the weights of the named metrics."""
        kinds = dict.fromkeys(METRICS[name].extractor for name in names if METRICS[name].extractor)
        return cls(
            pairs.prepare([name for name in names if name in of_command("pairs")], sources, device),
            [
                (EXTRACTORS[kind](sources, device), [n for n in names if METRICS[n].extractor == kind])
                for kind in kinds
            ],
            "attributes" in names,
        )


@dataclass(frozen=True)
class Judged:
    """A row for each setting, what features sets were compared by, and what a reader has to know."""

    rows: list[dict[str, Any]]
    features: list[dict[str, Any]]
    warnings: list[str]


def judge(
    sweep: Sweep,
    runs: Sequence[dict[str, Any]],
    judges: Judges,
    store: Store = Store(None),  # noqa: B008 (frozen)
    track: Track = untracked,
) -> Judged:
    """Speed from medians over the runs of a setting, quality from its outputs.

    Dense has no fidelity to itself, so its row has none of the metrics of pairs and sets.

    Args:
        sweep: whose runs are complete.
        runs: as `Sweep.run` returns them.
        judges: the metrics.
        store: of parts that are computed once.
        track: shows progress.
    """
    of = {name: [run for run in runs if run["setting"] == name] for name in sweep.methods}
    rows, features = [], []
    warnings = dict.fromkeys([PAIRED] if judges.sets else [])  # in order, each once
    for name, recipe in sweep.methods.items():
        outputs = sweep.outputs(name)
        row: dict[str, Any] = {
            "setting": name,
            "recipe": recipe and recipe.to_dict(),
            "outputs": f"{MEDIA}/{outputs.path.name}",
            "runs": len(of[name]),
            **{key: _median(of[name], key) for key in ("warm_up_seconds", "peak_memory_bytes", *DENSITIES)},
            "metrics": _speed(of[name], of[DENSE]),
        }
        if judges.attributes:
            row["attributes"] = _attributes(sweep, outputs)
            row["metrics"]["attributes"] = _quantity(row["attributes"]["mean"], "higher")
        if name != DENSE and judges.pairs:
            options = {"store": store, "track": track}
            row["pairs"] = pairs.measure(outputs, sweep.outputs(DENSE), judges.pairs, **options)
            row["metrics"] |= pairs.summarise(row["pairs"], judges.pairs)
        rows.append(row)
    for row, found in _sets(sweep, rows, judges, store, track):
        row["metrics"] |= found.metrics
        features.append({"setting": row["setting"], **found.features})
        warnings |= dict.fromkeys(found.warnings)
    commits = {run["commit"] for run in runs}
    if len(commits) > 1:
        warnings[f"the runs are of several commits: {', '.join(sorted(map(str, commits)))}"] = None
    return Judged(rows, features, list(warnings))


def _quantity(value: float, better: str) -> dict[str, Any]:
    return {"value": value, "better": better}


def _median(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    """Over the runs that know it; None if none does."""
    known = [run[key] for run in runs if run[key] is not None]
    return median(known) if known else None


def _speed(runs: Sequence[dict[str, Any]], dense: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    answer = {}
    for key, (time, speedup) in SPEED.items():
        ours, theirs = (median(run[key] for run in those) for those in (runs, dense))
        answer |= {time: _quantity(ours, "lower"), speedup: _quantity(theirs / ours, "higher")}
    return answer


def _attributes(sweep: Sweep, outputs: Folder) -> dict[str, float | int]:
    """Share of right attributes over the prompts."""
    from dit_accel.pipelines.tiny import check, score

    seen = [check(media.load(path)) for path in outputs.files]
    return score(seen, asked(sweep.prompts))


def _sets(
    sweep: Sweep, rows: Sequence[dict[str, Any]], judges: Judges, store: Store, track: Track
) -> Iterable[tuple[dict[str, Any], sets.Comparison]]:
    """Every row but dense's with the comparison of its outputs with dense's, for each extractor."""
    for extractor, names in judges.sets:
        reference: Folder | sets.Statistics = sweep.outputs(DENSE)
        for row in rows:
            if row["setting"] != DENSE:
                outputs = sweep.outputs(row["setting"])
                found = sets.compare(names, outputs, reference, extractor, store=store, track=track)
                reference = found.reference  # features of dense outputs, from the first comparison on
                yield row, found
