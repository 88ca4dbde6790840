"""Metrics of pairs: two folders of images or videos whose files have the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_accel.files import digest
from dit_accel.media import one_colour
from dit_accel.scorers import efficientnet, pretrained, scene_encoder

from . import fidelity
from .catalogue import METRICS
from .folders import Folder, Store, Track, choose, read, untracked

if TYPE_CHECKING:
    from pathlib import Path

MS_SSIM_LEAST = 176  # pixels a side: torchmetrics wants its window of 11 sixteen times
LPIPS_LEAST = 63  # pixels a side that AlexNet's poolings need
SHOWN = 5  # names in a message

Score = Callable[[np.ndarray, np.ndarray], float]  # of test and reference, uint8 (frames, height, width, 3)


@dataclass(frozen=True)
class PairMetric:
    """A metric that is ready to run, and what a result has to say about it."""

    score: Score
    settings: dict[str, Any]


def match(test: Folder, reference: Folder) -> tuple[str, ...]:
    """The names that both folders have.

    Raises:
        ValueError: a name that only one of them has.
    """
    for one, other in ((test, reference), (reference, test)):
        alone = sorted(set(one.names) - set(other.names))
        if alone:
            more = f" and {len(alone) - SHOWN} more" if len(alone) > SHOWN else ""
            raise ValueError(
                f"{len(alone)} of {len(one)} files in {one.path} have no partner of the same name in "
                f"{other.path}: {', '.join(alone[:SHOWN])}{more}"
            )
    return test.names


def _tensor(frame: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (height, width, 3) as (1, 3, height, width) with values from 0 to 255."""
    return torch.tensor(frame, device=device).permute(2, 0, 1)[None].to(dtype)


def _ms_ssim(test: np.ndarray, reference: np.ndarray) -> float:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(test.shape[1:3]) < MS_SSIM_LEAST:
        raise ValueError(f"MS-SSIM needs at least {MS_SSIM_LEAST} pixels a side, got {_shape(test)}")
    scores = [
        multiscale_structural_similarity_index_measure(
            *(_tensor(frame, torch.device("cpu"), torch.float64) for frame in pair), data_range=255.0
        ).item()
        for pair in zip(test, reference, strict=True)
    ]
    return float(np.mean(scores))


def _lpips(sources: pretrained.Sources, device: torch.device) -> tuple[Score, str]:
    """LPIPS with AlexNet, and the hash of all its weights.

    torchmetrics ships the linear layers; its public class takes the backbone's weights only from the folder
    that torch.hub downloads to, so the network itself is built and filled here.
    """
    import torchvision  # pyright: ignore[reportMissingImports]
    from torchmetrics.functional.image.lpips import _LPIPS

    weights = torch.load(pretrained.ALEXNET.get(sources), map_location="cpu", weights_only=True)
    with torch.random.fork_rng(devices=()):  # initial values are drawn only to be replaced
        backbone = torchvision.models.alexnet(weights=None)
        network = _LPIPS(net="alex", pnet_rand=True)
    backbone.load_state_dict(weights)
    with torch.no_grad():
        for ours, theirs in zip(network.net.parameters(), backbone.features.parameters(), strict=True):
            ours.copy_(theirs)
    network.to(device)

    @torch.inference_mode()
    def score(test: np.ndarray, reference: np.ndarray) -> float:
        if min(test.shape[1:3]) < LPIPS_LEAST:
            raise ValueError(f"LPIPS needs at least {LPIPS_LEAST} pixels a side, got {_shape(test)}")
        scores = [
            network(*(_tensor(frame, device, torch.float32) / 127.5 - 1 for frame in pair)).item()
            for pair in zip(test, reference, strict=True)
        ]
        return float(np.mean(scores))

    return score, pretrained.fingerprint(network)


def _efficientnet(device: torch.device) -> tuple[Score, str]:
    """The distance of EfficientNet-Lite0's activations, and the hash of its weights."""
    network = efficientnet.load().to(device)

    @torch.inference_mode()
    def score(test: np.ndarray, reference: np.ndarray) -> float:
        resized = (
            [
                scene_encoder.resize(_tensor(frame, device, torch.float32) / 255, efficientnet.SIDE)
                for frame in pair
            ]
            for pair in zip(test, reference, strict=True)
        )
        return float(np.mean([network.distance(*pair).item() for pair in resized]))

    return score, pretrained.fingerprint(network)


def prepare(names: Sequence[str], sources: pretrained.Sources, device: torch.device) -> dict[str, PairMetric]:
    """The named metrics, with their weights loaded."""
    window = f"Gaussian, sigma {fidelity.SSIM_SIGMA}, {fidelity.SSIM_WINDOW} pixels"
    plain = {"backbone": None, "input_range": [0, fidelity.DATA_RANGE]}
    ready = {}
    for name in names:
        if name == "psnr":
            ready[name] = PairMetric(fidelity.psnr, {**plain, "window": None, "over_frames": "pooled error"})
        elif name == "ssim":
            ready[name] = PairMetric(fidelity.ssim, {**plain, "window": window, "over_frames": "mean"})
        elif name == "ms_ssim":
            settings = {**plain, "window": f"{window}, 5 scales", "over_frames": "mean"}
            ready[name] = PairMetric(_ms_ssim, settings)
        elif name == "lpips":
            score, weights = _lpips(sources, device)
            settings = {"backbone": "AlexNet", "weights_sha256": weights, "input_range": [-1, 1]}
            ready[name] = PairMetric(score, {**settings, "window": None, "over_frames": "mean"})
        elif name == "efficientnet_distance":
            score, weights = _efficientnet(device)
            settings = {"backbone": "EfficientNet-Lite0", "weights_sha256": weights, "input_range": [0, 1]}
            ready[name] = PairMetric(score, {**settings, "window": None, "over_frames": "mean"})
        else:
            raise ValueError(f"there is no metric of pairs called {name!r}")
    return ready


def _shape(frames: np.ndarray) -> str:
    count, height, width, _ = frames.shape
    return f"{width}x{height}" + (f", {count} frames" if count > 1 else "")


class _Pair:
    """Two files, read when the first metric asks for them."""

    def __init__(self, test: Path, reference: Path, choice: str):
        self._paths, self._choice = (test, reference), choice
        self._frames: tuple[np.ndarray, np.ndarray] | None = None

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        if self._frames is None:
            test, reference = (read(path) for path in self._paths)
            if test.shape != reference.shape:
                raise ValueError(f"sizes differ: {_shape(test)} and {_shape(reference)}")
            self._frames = choose(test, self._choice), choose(reference, self._choice)
        return self._frames


def measure(
    test: Folder,
    reference: Folder,
    metrics: dict[str, PairMetric],
    *,
    frames: str = "all",
    store: Store = Store(None),  # noqa: B008 (frozen)
    track: Track = untracked,
) -> list[dict[str, Any]]:
    """The metrics of every pair of files, as rows with `name`, a value by metric, and `one_colour`.

    `one_colour` says whether either side is of a single colour, such as black.

    Raises:
        ValueError: files without a partner, of another size or length than it, or unreadable.
    """
    rows = []
    for name in track(match(test, reference), "pairs"):
        paths = test.path / name, reference.path / name
        pair, key = _Pair(*paths, frames), [*(digest(path) for path in paths), frames]
        row: dict[str, Any] = {"name": name}
        for metric, ready in metrics.items():

            def compute(score: Score = ready.score, pair: _Pair = pair) -> np.ndarray:
                return np.array(score(*pair.frames()))

            try:
                row[metric] = store.get(["pair", metric, ready.settings, *key], compute).item()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        blank = partial(_one_colour, pair)
        row["one_colour"] = bool(store.get(["pair", "one colour", *key], blank).item())
        rows.append(row)
    return rows


def _one_colour(pair: _Pair) -> np.ndarray:
    return np.array(any(map(one_colour, pair.frames())))


def one_colour_warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is to be said of pairs with a side that shows nothing."""
    names = [row["name"] for row in rows if row["one_colour"]]
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [
        f"{len(names)} of {len(rows)} pairs have a side of one colour, such as black, of which metrics say "
        f"nothing: {', '.join(names[:SHOWN])}{more}"
    ]


def summarise(rows: Sequence[dict[str, Any]], metrics: dict[str, PairMetric]) -> dict[str, dict[str, Any]]:
    """Mean and range of each metric over the pairs; pairs without any difference have no PSNR to average."""
    answer = {}
    for metric, ready in metrics.items():
        values = [row[metric] for row in rows if math.isfinite(row[metric])]
        answer[metric] = {
            "value": float(np.mean(values)) if values else None,
            "better": METRICS[metric].better,
            "lowest": min(values, default=None),
            "highest": max(values, default=None),
            "pairs": len(values),
            "settings": ready.settings,
        }
        if metric == "psnr":
            answer[metric]["identical"] = len(rows) - len(values)
    return answer
