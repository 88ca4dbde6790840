"""What layers that choose by content keep from one executed step of a run to the next."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any


class RunMemory:
    """Of one run of an enabled recipe, in one thread; it goes with the run."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self._calls: dict[str, tuple[Hashable, int]] = {}

    def call(self, transformer: str, evaluation: Hashable) -> CallMemory:
        """What a call of a transformer sees of it.

        Calls of one evaluation of the model are its guidance branches: each finds what the call of the same
        place among them has kept in an earlier evaluation.
        """
        latest, number = self._calls.get(transformer, (None, 0))
        number = number + 1 if latest == evaluation else 0
        self._calls[transformer] = evaluation, number
        return CallMemory(self._kept, (transformer, number))


@dataclass(eq=False)
class CallMemory:
    """What one call of a transformer sees of its run's memory.

    A layer that runs twice in a call, as gradient checkpointing and the guard let it, finds the second time
    what it found the first time, and what it then keeps is ignored.
    """

    _kept: dict[Hashable, Any]
    _place: tuple[Hashable, ...]
    _found: dict[Hashable, Any] = field(default_factory=dict)
    _written: set[Hashable] = field(default_factory=set)

    def within(self, name: Hashable) -> CallMemory:
        """A part of it: a layer's, or that of a second forward in the same call."""
        return replace(self, _place=(*self._place, name))

    def recall(self, *key: Hashable) -> Any:
        """What was kept under a key before this call, or None."""
        place = (*self._place, *key)
        if place not in self._found:
            self._found[place] = self._kept.get(place)
        return self._found[place]

    def keep(self, value: Any, *key: Hashable) -> None:
        """Lets later calls find `value` under a key."""
        place = (*self._place, *key)
        if place not in self._written:
            self._written.add(place)
            self._kept[place] = value
