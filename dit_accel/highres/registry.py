"""The methods by name."""

from __future__ import annotations

from typing import Any

from dit_accel.arguments import shown

from .anchor import Anchor
from .compressed import Compressed
from .context import TimeWindows
from .direct import Direct, Naive, Upscaled
from .flow import Flow
from .growing import Growing
from .method import Method
from .native import Native, Size
from .projected import Projected
from .regional import Regional
from .swim import Swim
from .windowed import ClearWindows, Shifted

_KINDS = (
    Swim, ClearWindows, Shifted, Projected, Flow, Growing, Regional, Anchor, Compressed, TimeWindows,
    Direct, Upscaled, Naive,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {kind.name: kind for kind in _KINDS}


def method_of(method: Any, native: Native, base: Size) -> Method:
    """A method by name, with options that suit the model, or as it is given.

    Raises:
        ValueError: an unknown name, or something else.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"`method` must be one of {', '.join(METHODS)}, or such an object, got {shown(method)}"
        )
    return METHODS[method].suited(native, base)
