"""Patterns: which token pairs are computed."""

from .base import AxisWise, Pattern
from .clear import Clear
from .dense import Dense
from .inward_window import InwardWindow
from .local_global import LocalGlobal
from .neighborhood import Neighborhood
from .radial import Radial
from .shifted_window import ShiftedWindow
from .sliding_tile import SlidingTile
from .sparse_videogen import SparseVideoGen, SpatialHead, TemporalHead

__all__ = [
    "AxisWise",
    "Clear",
    "Dense",
    "InwardWindow",
    "LocalGlobal",
    "Neighborhood",
    "Pattern",
    "Radial",
    "ShiftedWindow",
    "SlidingTile",
    "SparseVideoGen",
    "SpatialHead",
    "TemporalHead",
]
