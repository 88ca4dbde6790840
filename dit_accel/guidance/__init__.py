"""Guidance by perturbation: away from what the model predicts when some attention heads are weakened."""

from typing import Any

from .perturbation import HeadPerturbation

__all__ = ["HeadPerturbation", "HeadPerturbationGuidance"]


def __getattr__(name: str) -> Any:
    if name == "HeadPerturbationGuidance":  # imports diffusers, which takes seconds
        from .guider import HeadPerturbationGuidance

        return HeadPerturbationGuidance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
