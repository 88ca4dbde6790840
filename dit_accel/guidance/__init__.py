"""Guidance by perturbation: away from what the model predicts when some attention heads are weakened."""

from typing import TYPE_CHECKING, Any

from .perturbation import HeadPerturbation

if TYPE_CHECKING:
    from .guider import HeadPerturbationGuidance
    from .hunter import HeadHunter

__all__ = ["HeadHunter", "HeadPerturbation", "HeadPerturbationGuidance"]


def __getattr__(name: str) -> Any:
    if name == "HeadPerturbationGuidance":  # imports diffusers, which takes seconds
        from .guider import HeadPerturbationGuidance

        return HeadPerturbationGuidance
    if name == "HeadHunter":  # imports recipes, which import this package
        from .hunter import HeadHunter

        return HeadHunter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
