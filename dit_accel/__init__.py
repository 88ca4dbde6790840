"""dit-accel: faster attention and better steering for Hugging Face diffusers transformers."""

from .blockmask import BlockMask
from .errors import DitAccelError, UnavailableError
from .layout import TokenLayout
from .recipe import Recipe, presets
from .summary import summary
from .switch import Handle, accelerated, disable, enable, handle_of

__version__ = "0.1.0"
__all__ = [
    "BlockMask",
    "DitAccelError",
    "Handle",
    "Recipe",
    "TokenLayout",
    "UnavailableError",
    "accelerated",
    "disable",
    "enable",
    "handle_of",
    "presets",
    "summary",
]
