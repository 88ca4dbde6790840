"""The geometries that a transformer met under a recipe, each with what its layers compute, built once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dit_accel.bounded_dict import make_room
from dit_accel.masks.layout import TokenLayout
from dit_accel.recipe.layer_patterns import Chunks, LayerPatterns

from .geometry import Geometry

_MOST = 16

Build = Callable[
    [list[LayerPatterns], TokenLayout, torch.device, torch.dtype, "Chunks | None", "Geometry | None"],
    Geometry,
]


class GeometryCache:
    """Geometries by layout, device, dtype and, where patterns change from step to step, by what they are.

    Args:
        layers: what the recipe gives each.
        build: (layers, layout, device, dtype, chunks, like) to a geometry, with the order and block size of
            `like` where that is given.
    """

    def __init__(self, layers: list[LayerPatterns], build: Build):
        self._layers, self._build = layers, build
        used = dict.fromkeys(pattern for layer in layers for pattern in layer.patterns)
        self._changing = [pattern for pattern in used if len(pattern.variants) > 1]
        self._found: dict[tuple, Geometry] = {}

    def at(
        self,
        layout: TokenLayout,
        step: int,
        device: torch.device,
        dtype: torch.dtype,
        sigma: float | None = None,
        chunks: Chunks | None = None,
        total: int | None = None,
    ) -> Geometry:
        """The geometry of a layout at a sampler step of `total`, which begins at noise level `sigma`.

        Where patterns change from step to step, block size and token order stay as they are at all of them.
        `chunks` are those that the model tells apart by itself.
        """
        sparse = chunks and replace(chunks, dense=False)
        geometry = self._get((layout, device, dtype, sparse), _within(sparse, self._layers), None)
        if not self._changing and chunks == sparse:
            return geometry
        shapes = tuple(pattern.at_step(step, sigma, total) for pattern in self._changing)
        layers = [layer.at_step(step, sigma, total) for layer in self._layers]
        return self._get((layout, device, dtype, chunks, shapes), _within(chunks, layers), geometry)

    def _get(self, key: tuple[Any, ...], layers: list[LayerPatterns], like: Geometry | None) -> Geometry:
        found = self._found.get(key)
        if found is None:
            with torch.inference_mode(False):  # what stays must be usable under autograd later
                found = self._build(layers, *key[:4], like)
            make_room(self._found, _MOST)
            self._found[key] = found
        return found


def _within(chunks: Chunks | None, layers: list[LayerPatterns]) -> list[LayerPatterns]:
    return layers if chunks is None else [chunks.within(layer) for layer in layers]
