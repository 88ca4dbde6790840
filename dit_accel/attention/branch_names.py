"""Which guidance branch a call of a transformer is of: the name that pipelines give it in `cache_context`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# diffusers' `cache_context` is not readable but while caches are on
_name: ContextVar[str | None] = ContextVar("dit_accel_cache_context", default=None)


def branch_name() -> str | None:
    """Such as `"cond"` or `"uncond"`; None of both in one call, and where no `cache_context` is heard."""
    name = _name.get()
    return None if name == "cond_uncond" else name


class BranchNames:
    """Listens to the `cache_context` of one transformer, while it is attached."""

    def __init__(self, transformer: Any):
        self.transformer = transformer

    def attach(self) -> None:
        if hasattr(self.transformer, "cache_context"):
            self.transformer.cache_context = self._cache_context

    def detach(self) -> None:
        if self.transformer.__dict__.get("cache_context") == self._cache_context:
            del self.transformer.cache_context

    @contextmanager
    def _cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        token = _name.set(name)
        try:
            with type(self.transformer).cache_context(self.transformer, name, **kwargs):
                yield
        finally:
            _name.reset(token)
