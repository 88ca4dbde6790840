"""What kernels derive from a mask before they can launch (row orders, chunks), made once and kept with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Kind = TypeVar("Kind")


class LaunchData:
    """What backends derived from one mask: at most one value of each type and arguments.

    A backend keeps a type of its own here, so that none can take another's. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._values: dict[tuple, Any] = {}

    def get(self, kind: type[Kind], make: Callable[[], Kind], *arguments: Hashable) -> Kind:
        """The value of type `kind` for `arguments`, made by `make` the first time.

        What is made under `torch.inference_mode` can serve autograd later.
        """
        key = (kind, *arguments)
        if key not in self._values:
            with torch.inference_mode(False):
                self._values[key] = make()
        return self._values[key]

    def __contains__(self, key: tuple) -> bool:
        return key in self._values

    def __getstate__(self) -> dict:
        return {"_values": {}}
