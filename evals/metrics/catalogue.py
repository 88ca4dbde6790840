"""The metrics of `dit-accel eval` by name: what each measures, and whether it can run here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from dit_accel.errors import UnavailableError
from dit_accel.scorers import efficientnet, pretrained
from dit_accel.scorers.pretrained import Sources

from .features import EXTRACTORS

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """One metric, and what it needs beyond the core dependencies.

    `extra` brings its packages, or what `install` names. `also` are files beside the weights. `prompt` says
    that it judges by the prompt. `kind` and `extractor` are for metrics of sets: the statistic, and whose
    features it is of.
    """

    name: str
    command: Literal["pairs", "dist", "scores", "attributes", "vbench"]
    description: str
    better: Better = "higher"
    packages: tuple[str, ...] = ()
    extra: str = "eval"
    install: str | None = None
    weights: pretrained.WeightsFile | pretrained.HubFiles | None = None
    also: tuple[pretrained.HubFiles, ...] = ()
    prompt: bool = False
    kind: str | None = None
    extractor: str | None = None

    def missing(self, sources: Sources) -> str | None:
        """Why the metric cannot run here, and the remedy; None if it can."""
        reasons = (files.missing(sources) for files in (self.weights, *self.also) if files)
        return self.missing_package() or "; ".join(filter(None, reasons)) or None

    def missing_package(self) -> str | None:
        """Which package cannot be used, why, and the remedy; None if all can.

        They are imported, not looked up: torchvision is often there for another build of torch.
        """
        remedy = f"pip install {self.install}" if self.install else f"pip install 'dit-accel[{self.extra}]'"
        for name in self.packages:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                return f"{error.name} is not installed: {remedy}"
            except Exception as error:  # whatever goes wrong in there
                remedy = remedy if self.install else "install its build for the torch that is here"
                return f"{name} cannot be imported ({error}): {remedy}"
        return None

    def describe(self, sources: Sources) -> dict[str, Any]:
        """The metric and its status, in JSON's terms."""
        reason = self.missing(sources)
        return {
            "name": self.name,
            "command": self.command,
            "description": self.description,
            "better": self.better,
            "available": reason is None,
            "reason": reason,
            "packages": list(self.packages),
            "weights": self.weights and self.weights.describe(),
            "also": [files.describe() for files in self.also],
            "needs_prompts": self.prompt,
        }


STATISTICS = {  # what a metric of sets computes from features, and what is better
    "frechet": ("Fréchet distance", "lower"),
    "kid": ("kernel distance (unbiased MMD, cubic kernel)", "lower"),
    "mmd": ("MMD under an RBF kernel", "lower"),
    "prdc": ("precision, recall, density and coverage", "higher"),
}
PUBLISHED = {  # the names that papers use
    ("frechet", "inception"): "fid",
    ("kid", "inception"): "kid",
    ("prdc", "inception"): "prdc",
    ("mmd", "clip"): "cmmd",
}


def set_metric(kind: str, extractor: str) -> str:
    """The name of a statistic of an extractor's features: the published one, or both parts."""
    return PUBLISHED.get((kind, extractor), f"{kind}-{extractor}")


def _set_metrics() -> list[Metric]:
    return [
        Metric(
            set_metric(kind, name),
            "dist",
            f"{description}, features of {extractor.title}",
            better,
            packages=extractor.packages,
            extra=extractor.extra,
            weights=extractor.weights,
            kind=kind,
            extractor=name,
        )
        for name, extractor in EXTRACTORS.items()
        for kind, (description, better) in STATISTICS.items()
    ]


COSINE = "exp(logit scale) x cosine of image and prompt, mean over frames"


def _scores() -> list[Metric]:
    """Those that are CLIP models, and those of packages of their own."""
    described = {
        "clip": f"CLIP ViT-L/14: {COSINE}",
        "pickscore": f"PickScore, of human choices: {COSINE}",
        "hpsv2": f"HPSv2, of human choices: {COSINE}",
        "aesthetics": "LAION's aesthetics v2, linear, from 1 to 10, mean over frames",
    }
    clips = [
        Metric(
            name,
            "scores",
            description,
            weights=pretrained.SCORERS[name][0],
            also=tuple(one for one in pretrained.SCORERS[name][1:] if one != pretrained.SCORERS[name][0]),
            prompt=name != "aesthetics",
        )
        for name, description in described.items()
    ]
    return [
        *clips,
        Metric(
            "image-reward",
            "scores",
            "ImageReward 1.0, of human choices, mean over frames",
            packages=("ImageReward",),
            install="image-reward git+https://github.com/openai/CLIP 'transformers<5'",
            weights=pretrained.IMAGE_REWARD,
            also=(pretrained.BERT,),
            prompt=True,
        ),
        Metric(
            "topiq",
            "scores",
            "TOPIQ without reference, of KonIQ-10k, from 0 to 1, mean over frames",
            packages=("pyiqa",),
            install="pyiqa",
            weights=pretrained.TOPIQ,
        ),
    ]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in [
        Metric("psnr", "pairs", "peak signal-to-noise ratio in dB, from the error over all frames"),
        Metric(
            "ssim",
            "pairs",
            "structural similarity, Gaussian window of sigma 1.5, mean over frames",
            packages=("skimage",),
            extra="cli",
        ),
        Metric("ms_ssim", "pairs", "SSIM on five scales, mean over frames", packages=("torchmetrics",)),
        Metric(
            "lpips",
            "pairs",
            "learned perceptual distance, AlexNet, mean over frames",
            "lower",
            packages=("torchmetrics", "torchvision"),
            extra="eval-full",
            weights=pretrained.ALEXNET,
        ),
        Metric(
            "efficientnet_distance",
            "pairs",
            "distance of EfficientNet-Lite0's activations of ImageNet, mean over frames; it is not LPIPS",
            "lower",
            packages=efficientnet.PACKAGES,
            extra="efficientnet",
        ),
        *_set_metrics(),
        *_scores(),
        Metric("attributes", "attributes", "what the bundled models draw, read back from pixels by rule"),
        Metric("temporal_flickering", "vbench", "VBench's, from the difference of successive frames"),
        Metric(
            "subject_consistency",
            "vbench",
            "VBench's, from DINO ViT-B/16's features of the frames",
            weights=pretrained.DINO,
        ),
        Metric(
            "background_consistency",
            "vbench",
            "VBench's, from CLIP ViT-B/32's features of the frames",
            weights=pretrained.CLIP_B32,
        ),
    ]
}


def of_command(command: str) -> dict[str, Metric]:
    """The metrics of one subcommand of `dit-accel eval`, by name."""
    return {name: metric for name, metric in METRICS.items() if metric.command == command}


def by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    """Metrics by what keeps them from running, which several may share."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return groups


def available(names: list[str], sources: Sources, allow_skipped: bool) -> tuple[list[str], dict[str, str]]:
    """Splits names into those that can run here, and the others with their reasons.

    Raises:
        UnavailableError: one that cannot run and may not be skipped, or none that can.
    """
    skipped = {name: reason for name in names if (reason := METRICS[name].missing(sources)) is not None}
    if skipped and not allow_skipped:
        reasons = "; ".join(f"{', '.join(group)}: {reason}" for reason, group in by_reason(skipped).items())
        raise UnavailableError(f"{reasons}; --allow-skipped goes on without")
    if len(skipped) == len(names):
        raise UnavailableError(f"none of {', '.join(names)} can run here; `dit-accel eval list` says why")
    return [name for name in names if name not in skipped], skipped
