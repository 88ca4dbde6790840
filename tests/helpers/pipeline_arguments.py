"""What the tests' ways to run a pipeline pass to it: for functions that call it themselves."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock


def arguments_of(tools, pipe, **options) -> dict:
    """The arguments of the call that `tools.run(pipe, **options)` makes, without noise."""
    seen: dict = {}

    def take(self, *args, **kwargs):
        seen.update(kwargs)
        return SimpleNamespace(frames=None, images=None)

    with mock.patch.object(type(pipe), "__call__", take):
        tools.run(pipe, **options)
    return {name: value for name, value in seen.items() if name != "generator"}
