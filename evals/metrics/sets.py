"""Features of whole folders, kept so that they are computed once, and the metrics of sets from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.files import atomic, digest

from . import distribution
from .catalogue import METRICS, set_metric
from .features import Extractor
from .folders import Folder, Store, Track, combined, read, untracked

SCHEMA = "dit-accel/statistics/1"
CHUNK = 64  # files whose features are kept together: what an interrupted run loses at most
BATCH = 64  # pictures that go through an extractor at once


@dataclass(frozen=True)
class Source:
    """What features are of: the extractor, how pictures got to its size, and which files."""

    extractor: str
    extractor_sha256: str
    resize: str
    frames: str
    data_sha256: str
    files: int


@dataclass(frozen=True)
class Statistics:
    """Features (n, d) of a set, with their source."""

    features: torch.Tensor
    source: Source

    def check_made_with(self, extractor: Extractor, frames: str) -> None:
        """Refuses features of another extractor, or of pictures that were treated in another way.

        Raises:
            ValueError: naming what differs.
        """
        ours = (extractor.name, extractor.fingerprint, extractor.resize, frames)
        source = self.source
        theirs = (source.extractor, source.extractor_sha256, source.resize, source.frames)
        names = ("extractor", "weights (sha256)", "resize", "frames")
        for name, mine, other in zip(names, ours, theirs, strict=True):
            if mine != other:
                raise ValueError(
                    f"these statistics were made with {name} {other!r}, and this run has {mine!r}"
                )

    def save(self, path: Path) -> None:
        """Writes an .npz with features, mean and covariance, atomically."""
        mean, covariance = distribution.gaussian(self.features)
        meta = json.dumps({"schema": SCHEMA, **asdict(self.source)})
        arrays = {"features": self.features.numpy(), "mu": mean.numpy(), "sigma": covariance.numpy()}
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, meta=np.array(meta), **arrays)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Reads what `save` wrote.

        Raises:
            ValueError: a file that is missing, damaged or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                meta, features = json.loads(str(file["meta"])), torch.from_numpy(file["features"])
            if meta.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            return cls(features, Source(**meta))
        except Exception as error:  # NumPy raises what zipfile, zlib and its own parser raise
            raise ValueError(
                f"{path} does not hold statistics as --save-stats writes them: {error}"
            ) from error


def gather(
    folder: Folder,
    extractor: Extractor,
    *,
    frames: str = "middle",
    store: Store = Store(None),  # noqa: B008 (frozen)
    track: Track = untracked,
) -> Statistics:
    """Features of the chosen frames of every file in `folder`, in the order of names.

    Raises:
        ValueError: a file that cannot be read.
    """
    files = folder.files
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    digests, parts = [], []
    for chunk in track(chunks, f"{folder.path.name} through {extractor.name}"):
        hashes = [digest(path) for path in chunk]

        def compute(chunk: Sequence[Path] = chunk) -> np.ndarray:
            pictures = (frame for path in chunk for frame in read(path, frames))
            batches = iter(lambda: list(islice(pictures, BATCH)), [])
            return np.concatenate([extractor(batch).numpy() for batch in batches])

        key = ["features", extractor.name, extractor.fingerprint, extractor.resize, frames, *hashes]
        parts.append(store.get(key, compute))
        digests += hashes
    source = Source(
        extractor.name, extractor.fingerprint, extractor.resize, frames, combined(digests), len(files)
    )
    return Statistics(torch.from_numpy(np.concatenate(parts)), source)


def measure(kind: str, test: Statistics, reference: Statistics) -> dict[str, dict[str, Any]]:
    """The quantities of one statistic, by name; `value`, `better` and how it was computed."""
    extractor = test.source.extractor
    name = set_metric(kind, extractor)
    better = METRICS[name].better
    a, b = test.features, reference.features
    if kind == "frechet":
        return {name: {"value": distribution.frechet(a, b), "better": better}}
    if kind == "kid":
        value, deviation, size = distribution.kid(a, b)
        settings = {**distribution.KID, "subset_size": size}
        return {name: {"value": value, "better": better, "deviation": deviation, "settings": settings}}
    if kind == "mmd":
        return {name: {"value": distribution.mmd(a, b), "better": better, "settings": distribution.MMD}}
    if kind == "prdc":
        return {
            f"{quantity}-{extractor}": {"value": value, "better": better, "settings": distribution.PRDC}
            for quantity, value in distribution.prdc(a, b).items()
        }
    raise ValueError(f"there is no statistic called {kind!r}")


@dataclass(frozen=True)
class Comparison:
    """Quantities by name, what features they are from, and what a reader has to know."""

    metrics: dict[str, dict[str, Any]]
    features: dict[str, Any]
    warnings: list[str]
    reference: Statistics


def compare(
    names: Sequence[str],
    test: Folder,
    reference: Folder | Statistics,
    extractor: Extractor,
    *,
    frames: str = "middle",
    store: Store = Store(None),  # noqa: B008 (frozen)
    track: Track = untracked,
) -> Comparison:
    """The named set metrics, all of one extractor's features.

    Below 2,048 samples the Fréchet distance comes with a warning, and with KID whether asked for or not.

    Raises:
        ValueError: files that cannot be read, too few of them, or statistics that were made in another way.
    """
    if isinstance(reference, Statistics):
        reference.check_made_with(extractor, frames)
    else:
        reference = gather(reference, extractor, frames=frames, store=store, track=track)
    sample = gather(test, extractor, frames=frames, store=store, track=track)
    names, warnings = list(names), []
    frechet, kid = (set_metric(kind, extractor.name) for kind in ("frechet", "kid"))
    fewest = min(len(sample.features), len(reference.features))
    if frechet in names and fewest < distribution.FRECHET_SAMPLES:
        names += [kid] if kid not in names else []
        warnings.append(
            f"{frechet} of {fewest} samples is biased upward (below {distribution.FRECHET_SAMPLES:,}); "
            f"{kid} is not: read it beside"
        )
    metrics: dict[str, dict[str, Any]] = {}
    for name in names:
        metrics |= measure(METRICS[name].kind, sample, reference)
    features = {
        "extractor": extractor.name,
        "title": extractor.title,
        "samples": {"test": len(sample.features), "reference": len(reference.features)},
        "test": asdict(sample.source),
        "reference": asdict(reference.source),
    }
    return Comparison(metrics, features, warnings, reference)


def jpeg_warnings(*folders: Folder) -> list[str]:
    """What compression with loss does to distances between sets."""
    return [
        f"{folder.jpegs} of {len(folder)} files in {folder.path} are JPEG: compression alone moves Fréchet "
        "distances by more than models differ; compare lossless files"
        for folder in folders
        if folder.jpegs
    ]
