"""What patterns make of a layer's input, seen where its queries are projected: gates, for example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_accel.attention import transformer_call
from dit_accel.attention.call import LayerSizes
from dit_accel.errors import UnavailableError
from dit_accel.patterns import Pattern
from dit_accel.pipelines.families.base import Family
from dit_accel.recipe.layer_patterns import LayerPatterns


class LayerInputs:
    """Hooks on the projections of layers whose patterns read their input.

    Args:
        family: knows the projections.
        modules: attention modules by layer name.
        layers: what the recipe says of each.
        sizes: of each.
        owner: whose calls they are in.

    Raises:
        UnavailableError: a layer whose projection is not known.
    """

    def __init__(
        self,
        family: Family,
        modules: Mapping[str, nn.Module],
        layers: Sequence[LayerPatterns],
        sizes: Mapping[str, LayerSizes],
        owner: Any,
    ):
        self._owner, self._sizes = owner, sizes
        self._readers: dict[str, tuple[nn.Module, Pattern]] = {}
        self._hooks: list = []
        for layer in layers:
            variants = [variant for pattern in layer.patterns for variant in pattern.variants]
            reader = next((variant for variant in variants if variant.reads_input), None)
            if reader is None:
                continue
            projection = family.query_projection(modules[layer.name])
            if projection is None:
                raise UnavailableError(
                    f"{reader} reads what queries are projected from, and where layer {layer.name} does that "
                    "is not known; make the layer dense, or use another pattern"
                )
            self._readers[layer.name] = projection, reader

    def attach(self) -> None:
        for name, (projection, reader) in self._readers.items():
            hook = projection.register_forward_pre_hook(partial(self._seen, name, reader))
            self._hooks.append(hook)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.compiler.disable
    def _seen(self, name: str, reader: Pattern, module: nn.Module, args: tuple) -> None:
        call = transformer_call.current(self._owner)
        learned = {} if call is None else call.learned.get(name, {})
        if call is None or name not in call.layers or not learned:
            return
        if call.shards_of(name) is not None:
            raise UnavailableError(
                f"what {reader} learned reads a layer's input, of which processes that share a call "
                "(`enable_parallelism`) have a part each; use one process, or leave `adapter` out"
            )
        beside = reader.of_input(self._visual(name, args[0], call), learned, self._sizes[name].heads)
        if beside is not None:
            call.beside[name] = beside

    def _visual(self, name: str, x: torch.Tensor, call: transformer_call.TransformerCall) -> torch.Tensor:
        """The visual tokens of an input (B, n, C)."""
        layout = call.layouts[name]
        if x.ndim == 3 and x.shape[1] == layout.seq_len:
            return x[:, layout.visual_slice]
        if x.ndim == 3 and x.shape[1] == layout.visual_len + layout.anchor_len:
            return x[:, : layout.visual_len]
        raise UnavailableError(
            f"layer {name} projects its queries from a tensor of shape {tuple(x.shape)}, not from the "
            f"{layout.seq_len} tokens of {layout}; make the layer dense, or leave `adapter` out"
        )


def layer_sizes(family: Family, module: nn.Module, heads: int, head_dim: int) -> LayerSizes:
    """Of an attention module; a `width` of 0 where its projection is not known."""
    projection = family.query_projection(module)
    while projection is not None and "base_layer" in projection._modules:  # PEFT's wrappers
        projection = projection._modules["base_layer"]
    return LayerSizes(head_dim, heads, getattr(projection, "in_features", 0))
