"""Small trained models of real diffusers classes, the scenes they draw and the rules that check them.

``weights_dir(name)`` is an ordinary pipeline folder; ``INFO[name]`` says at which sizes and with which
settings the model works best.
"""

from .captions import caption, read_caption
from .checker import check, score
from .evaluate import attribute_accuracy
from .models import SPECS as INFO
from .models import Spec, weights_dir
from .scenes import render

NAMES = tuple(INFO)

__all__ = [
    "INFO",
    "NAMES",
    "Spec",
    "attribute_accuracy",
    "caption",
    "check",
    "read_caption",
    "render",
    "score",
    "weights_dir",
]
