"""Whether what an adapter has learned beside projections is what the recipe's patterns take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dit_accel.attention.approximate import TAPS_IN
from dit_accel.attention.call import LayerSizes
from dit_accel.attention.pooled import POOLING
from dit_accel.attention.sparse_linear import WEIGHT
from dit_accel.attention.video_sparse import GATE
from dit_accel.recipe.adapter_parts import noun
from dit_accel.recipe.layer_patterns import LayerPatterns

from .adapted import Adapted

Shapes = Mapping[str, tuple[int, ...]]


def check_learned(
    adapted: Adapted,
    layers: Sequence[LayerPatterns],
    places: Mapping[str, str],
    sizes: Mapping[str, LayerSizes],
) -> None:
    """Raise ValueError unless each layer whose pattern learns finds its weights, if the adapter has any.

    Args:
        adapted: the adapter in a transformer.
        layers: what the recipe says of each layer.
        places: by layer, the name of its attention module.
        sizes: of each layer.
    """
    found, file = adapted.part.learned, adapted.file
    if not found:
        return
    shapes = {layer.name: _taken(layer, sizes[layer.name]) for layer in layers}
    if not any(shapes.values()):
        some = {name: one.shape for own in found.values() for name, one in own.items()}
        raise ValueError(
            f"adapter {file} has {noun(next(iter(some)))}, which no layer of this recipe takes; use "
            f"{_pattern(some)}"
        )
    for layer, taken in shapes.items():
        own = {name: one.shape for name, one in found.get(places[layer], {}).items()}
        if taken and taken != own:
            raise ValueError(
                f"layer {layer} takes {_said(taken)}, and adapter {file} has {_said(own) or 'none'} for it: "
                "it was made for another pattern"
            )


def _taken(layer: LayerPatterns, sizes: LayerSizes) -> dict[str, tuple[int, ...]]:
    variants = [variant for pattern in layer.patterns for variant in pattern.variants]
    return {name: tuple(x.shape) for one in variants for name, x in one.learned(sizes).items()}


def _said(shapes: Shapes) -> str:
    """In words: `"pooling weights of 4 x 4"`."""
    largest: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        largest[noun(name)] = max(largest.get(noun(name), ()), shape, key=len)
    return " and ".join(f"{kind} of {' x '.join(map(str, shape))}" for kind, shape in largest.items())


def _pattern(shapes: Shapes) -> str:
    """A pattern that takes them."""
    if TAPS_IN in shapes:
        return "`InLine()`"
    if GATE in shapes:
        return "`VideoSparse(...)`"
    return "`SparseLinear(...)`" if WEIGHT in shapes else f"`Clear(radius, downsample={shapes[POOLING][0]})`"
