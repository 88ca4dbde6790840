"""Pictures and videos larger than a model was trained for."""

from .anchor import Anchor
from .compressed import Compressed
from .context import ContextWindows, TimeWindows, context_windows
from .direct import Direct, Naive, Upscaled
from .extrapolation import Rotary
from .flow import Flow
from .generate import generate
from .growing import Growing
from .method import Method
from .presets import Preset, presets
from .projected import Projected
from .regional import Regional
from .registry import METHODS
from .rotary_tables import rotary
from .swim import Swim
from .windowed import ClearWindows, Shifted

__all__ = [
    "METHODS",
    "Anchor",
    "ClearWindows",
    "Compressed",
    "ContextWindows",
    "Direct",
    "Flow",
    "Growing",
    "Method",
    "Naive",
    "Preset",
    "Projected",
    "Regional",
    "Rotary",
    "Shifted",
    "Swim",
    "TimeWindows",
    "Upscaled",
    "context_windows",
    "generate",
    "presets",
    "rotary",
]
