"""dit-accel: faster attention and better steering for Hugging Face diffusers transformers."""

from . import checkout  # noqa: F401, before all that imports from beside this folder
from .attention.functional import attention
from .calibration.run import calibrate
from .distillation.run import distill
from .errors import DitAccelError, NonFiniteError, UnavailableError
from .guidance import perturbed_model  # noqa: F401, which `HeadPerturbation.applied` calls
from .masks.block_mask import BlockMask
from .masks.layout import TokenLayout
from .patterns.calibration import Calibration
from .recipe.recipe import Recipe, presets
from .runtime.switching import Handle, accelerated, disable, enable, handle_of
from .summary import summary

__version__ = "0.1.0"
__all__ = [
    "BlockMask",
    "Calibration",
    "DitAccelError",
    "Handle",
    "NonFiniteError",
    "Recipe",
    "TokenLayout",
    "UnavailableError",
    "accelerated",
    "attention",
    "calibrate",
    "disable",
    "distill",
    "enable",
    "handle_of",
    "presets",
    "summary",
]
