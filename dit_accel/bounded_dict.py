"""Dicts that keep the latest entries alone."""

from __future__ import annotations

from typing import Any


def make_room(kept: dict[Any, Any], most: int) -> None:
    """Drops the oldest entries of a dict, so that one more makes `most` at the most; from any thread."""
    for old in list(kept)[: max(0, len(kept) + 1 - most)]:
        kept.pop(old, None)
