"""Which patterns the heads of each attention layer of a transformer follow under a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dit_accel.attention.functional import check_format, check_tail
from dit_accel.errors import UnavailableError
from dit_accel.layer_names import flat_indices
from dit_accel.patterns import ChunkCausal, Dense, Pattern

from . import selectors
from .recipe import Recipe


@dataclass(frozen=True)
class LayerPatterns:
    """The patterns of one attention layer at steps that are not dense.

    `heads` holds one pattern per head, or is empty where the layer keeps the model's own
    attention, for the `reason` given; `tail` is what keys contribute that they leave out, `quantization` the
    numeric format, of which dense heads have one too.
    """

    name: str
    heads: tuple[Pattern, ...] = ()
    reason: str = ""
    tail: str | None = None
    quantization: str | None = None

    @property
    def patterns(self) -> list[Pattern]:
        """The distinct patterns, in order of first use."""
        return list(dict.fromkeys(self.heads))

    @property
    def options(self) -> str:
        """What is said beside the patterns where it is shown: `", tail='pooled'"`, or an empty text."""
        named = (("tail", self.tail), ("quantization", self.quantization))
        return "".join(f", {name}={value!r}" for name, value in named if value)

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> LayerPatterns:
        """The same with what the patterns are at a step of `total`, which begins at noise level `sigma`."""
        heads = tuple(pattern.at_step(step, sigma, total) for pattern in self.heads)
        if heads and not self.quantization and not any(pattern.sparse for pattern in heads):
            return LayerPatterns(self.name, reason="Dense() at this step")
        return replace(self, heads=heads)


@dataclass(frozen=True)
class Chunks:
    """Chunks of frames that a model tells apart by itself: each frame has a timestep (diffusion forcing).

    Attributes:
        frames: of a chunk of chunk-causal attention, which then is the model's own, dense or not; 1: no such.
        heads: of its layers.
        dense: whether the step is.
    """

    frames: int
    heads: int
    dense: bool = False

    @property
    def causal(self) -> bool:
        return self.frames > 1

    def within(self, layer: LayerPatterns) -> LayerPatterns:
        """What the model's own mask leaves of a layer's patterns."""
        if not self.causal:
            return layer
        if layer.tail is not None:
            raise UnavailableError(
                f"`tail={layer.tail!r}` would let chunks see frames to come, which this model hides "
                f"(`causal_block_size` {self.frames}); use tail=None"
            )
        named = layer.heads and not self.dense
        own = layer.heads if named else (Dense(),) * self.heads
        restricted = {p: self._restricted(p) for p in dict.fromkeys(own)}
        heads = tuple(restricted[p] for p in own)
        return LayerPatterns(layer.name, heads, quantization=layer.quantization if named else None)

    def _restricted(self, pattern: Pattern) -> Pattern:
        if pattern.causal_chunks is None:
            return ChunkCausal(self.frames, pattern if pattern.sparse else None)
        if pattern.causal_chunks != self.frames:
            raise ValueError(
                f"this model's chunks have {self.frames} frames (`causal_block_size`), got {pattern} with "
                f"{pattern.causal_chunks}; use frames_per_chunk={self.frames}"
            )
        return pattern


def assign_patterns(recipe: Recipe, layers: list[str], heads: int) -> list[LayerPatterns]:
    """Gives each layer its patterns under a recipe.

    Raises:
        ValueError: selectors and indices that match nothing, a layer with two patterns that choose by
            content, with a tail or a format of some of its heads, or with a tail of patterns that hide keys
            on purpose.
    """
    attention = recipe.attention if isinstance(recipe.attention, dict) else {"all": recipe.attention}
    indices = flat_indices(layers)
    dense = recipe.dense_layer_indices(len(set(indices)))
    given = []
    rows = selectors.assign(attention, layers, heads)
    tails, formats = (_of_layers(recipe, name, layers, heads) for name in ("tail", "quantization"))
    for name, index, row, tail, format in zip(layers, indices, rows, tails, formats, strict=True):
        row = tuple(pattern and pattern.for_head(name, head) for head, pattern in enumerate(row))
        if index in dense:
            given.append(LayerPatterns(name, reason="dense_layers"))
        elif all(p is None for p in row):
            given.append(LayerPatterns(name, reason="no selector names it"))
        elif not format and not any(p is not None and p.sparse for p in row):
            given.append(LayerPatterns(name, reason="Dense()"))
        else:
            given.append(LayerPatterns(name, tuple(p or Dense() for p in row), "", tail, format))
            for pattern in given[-1].patterns:
                check_tail(tail, pattern)
                check_format(format, pattern)
            online = [p for p in given[-1].patterns if any(one.online for one in p.variants)]
            if len(online) > 1:
                raise ValueError(
                    f"heads of layer {name} choose by content in two ways, {online[0]} and {online[1]}; "
                    "use one of them in a layer"
                )
    return given


def _of_layers(recipe: Recipe, field: str, layers: list[str], heads: int) -> list[str | None]:
    """A field of the recipe for each layer: its tail, or its numeric format."""
    value = getattr(recipe, field)
    asked = value if isinstance(value, dict) else {"all": value}
    found = []
    for name, row in zip(layers, selectors.assign(asked, layers, heads), strict=True):
        if len(set(row)) > 1:
            raise ValueError(
                f"`{field}` names some heads of layer {name}; a layer has one {field}, so name all of its "
                "heads"
            )
        found.append(row[0])
    return found
