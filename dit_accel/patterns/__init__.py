"""Patterns: which token pairs are computed."""

from .base import AxisWise, Pattern
from .clear import Clear
from .dense import Dense
from .neighborhood import Neighborhood
from .radial import Radial
from .sliding_tile import SlidingTile

__all__ = ["AxisWise", "Clear", "Dense", "Neighborhood", "Pattern", "Radial", "SlidingTile"]
