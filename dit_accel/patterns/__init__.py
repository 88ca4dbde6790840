"""Patterns: which token pairs are computed."""

from .agent import Agent
from .base import AxisWise, OnlinePattern, Pattern, StaticPattern
from .by_noise import ByNoise
from .calibrated import Calibrated
from .chunk_causal import ChunkCausal
from .chunk_growth import ChunkGrowth
from .clear import Clear
from .clustered import Clustered
from .dense import Dense
from .inline import InLine
from .inward_window import InwardWindow
from .local_global import LocalGlobal
from .neighborhood import Neighborhood
from .radial import Radial
from .rectified import Rectified
from .routed import Routed
from .shifted_window import ShiftedWindow
from .skipping import Skipping
from .sliding_tile import SlidingTile
from .sparse_linear import SparseLinear
from .sparse_videogen import SparseVideoGen, SpatialHead, TemporalHead
from .video_sparse import VideoSparse

__all__ = [
    "Agent",
    "AxisWise",
    "ByNoise",
    "Calibrated",
    "ChunkCausal",
    "ChunkGrowth",
    "Clear",
    "Clustered",
    "Dense",
    "InLine",
    "InwardWindow",
    "LocalGlobal",
    "Neighborhood",
    "OnlinePattern",
    "Pattern",
    "Radial",
    "Rectified",
    "Routed",
    "ShiftedWindow",
    "Skipping",
    "SlidingTile",
    "SparseLinear",
    "SparseVideoGen",
    "SpatialHead",
    "StaticPattern",
    "TemporalHead",
    "VideoSparse",
]
