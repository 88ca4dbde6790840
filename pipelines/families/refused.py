"""Transformers that no family describes and that `layout=` would not describe either, with the reason."""

from __future__ import annotations

from typing import Any

_LINEAR = (
    "the attention over its tokens is linear already, without scores of pairs that a pattern could leave "
    "out; what is left, attention to text, is small"
)
REASONS = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": (
        "three of four of its layers are recurrent, without scores of pairs, and the others have no "
        "attention processor that could be replaced"
    ),
}


def why_refused(transformer: Any) -> str | None:
    """Why a transformer, or one derived from such, cannot be accelerated; None: nothing speaks against it."""
    return next((REASONS[c.__name__] for c in type(transformer).__mro__ if c.__name__ in REASONS), None)
