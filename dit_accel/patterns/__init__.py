"""Patterns: which token pairs are computed."""

from .base import AxisWise, Pattern
from .clear import Clear
from .dense import Dense
from .inward_window import InwardWindow
from .neighborhood import Neighborhood
from .radial import Radial
from .shifted_window import ShiftedWindow
from .sliding_tile import SlidingTile
from .sparse_videogen import SpatialHead, TemporalHead

__all__ = [
    "AxisWise",
    "Clear",
    "Dense",
    "InwardWindow",
    "Neighborhood",
    "Pattern",
    "Radial",
    "ShiftedWindow",
    "SlidingTile",
    "SpatialHead",
    "TemporalHead",
]
