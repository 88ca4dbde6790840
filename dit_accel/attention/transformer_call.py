"""One call of a transformer: what its attention layers compute in it, seen by this call alone.

The state of a call is built at the start of a transformer's forward and lives in a `ContextVar`, so that
threads that share a transformer do not see each other's, and a call that was interrupted leaves nothing that
the next one could take for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_accel.masks.layout import TokenLayout

from .call import AttentionCall, LayerAttention, ModelAttention
from .head_balance import Balance
from .run_memory import CallMemory
from .shards import Shards

_current: ContextVar[TransformerCall | None] = ContextVar("dit_accel_transformer_call", default=None)
_MODEL = ModelAttention()


@dataclass(frozen=True, eq=False)
class TransformerCall:
    """What the attention layers of one transformer do in one call.

    Attributes:
        owner: whose layers they are; a layer asks for the call of its owner.
        layers: attention by layer name; a layer that is not named keeps the model's own.
        layouts: tokens by layer name.
        text_valid: as in `AttentionCall`.
        step: sampler step.
        backend: of kernels.
        formats, tails: of kernels (`quantization`, `tail`), by the name of each layer that has one.
        learned: learned weights as in `AttentionCall`, by the name of each layer that has some.
        places: as in `AttentionCall`.
        geometry: what depends on the tokens' geometry, see `dit_accel.runtime.geometry`.
        any_length: whether a layer may attend to other tokens than the layout's, densely.
        moved: whether tokens were laid out in its order where they entered the transformer.
        memory: what its layers keep from step to step, or None.
        record: takes what the run did.
        guidance: what this call is to guidance, see `dit_accel.guidance.branch`.
        rows: of which branch its samples are, see `dit_accel.attention.dual_path`; None: there are no two.
        shards: what this process has of it, of several that share it; `layers` are then of its own heads.
        balances: by the name of each layer whose heads differ, which of them each process computes.
        notes: by layer, what kinds of attention told.
        beside: as in `AttentionCall`, by layer, from where its queries are projected until it attends.
        outer: the call of another transformer in which this one was made.
    """

    owner: Any
    layers: Mapping[str, LayerAttention]
    layouts: Mapping[str, TokenLayout]
    text_valid: torch.Tensor | None = None
    step: int = 0
    backend: str = "auto"
    formats: Mapping[str, str] = field(default_factory=dict)
    tails: Mapping[str, str] = field(default_factory=dict)
    learned: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    places: torch.Tensor | None = None
    geometry: Any = None
    any_length: bool = False
    moved: bool = False
    memory: CallMemory | None = None
    record: Any = None
    guidance: Any = None
    rows: Any = None
    shards: Shards | None = None
    balances: Mapping[str, Balance] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside: dict[str, torch.Tensor] = field(default_factory=dict)
    outer: TransformerCall | None = None

    def keeps_own(self, layer: str, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether a layer keeps the model's own attention of q and k (B, H, S, D)."""
        lengths = (q.shape[2], k.shape[2])
        if self.any_length and lengths != self.layouts[layer].call_lengths:
            self.notes.setdefault(layer, {})["other tokens"] = lengths
            return True
        return layer not in self.layers

    def shards_of(self, layer: str) -> Shards | None:
        """What this process has of a layer, where several share it."""
        return None if self.shards is None or layer not in self.shards.layers else self.shards

    def own_heads(self, layer: str, count: int) -> Sequence[int]:
        """Which of the `count` heads of a layer this process computes."""
        shards = self.shards_of(layer)
        if shards is None:
            return range(count)
        balance = self.balances.get(layer)
        return shards.own_heads if balance is None else balance.groups[shards.rank]

    def count_exchange(self, layer: str, q: torch.Tensor) -> None:
        """Records the bytes that the shared call of a layer sends; q of own heads, (B, S, h, D)."""
        width = self.shards.heads * q.shape[3]
        sent = self.shards.sent_bytes(self.layouts[layer], len(q), width, q.element_size())
        self.record.sent_bytes += sent

    def attention(self, layer: str) -> LayerAttention:
        return self.layers.get(layer, _MODEL)

    def attend(
        self,
        layer: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dense: Callable[[AttentionCall], torch.Tensor],
        scale: float | None = None,
    ) -> torch.Tensor:
        """The attention of a layer, like q; q, k, v (B, H, S, D) and `dense` as in `AttentionCall`."""
        layout = self.layouts[layer]
        notes = self.notes.setdefault(layer, {})
        call = AttentionCall(
            q,
            k,
            v,
            layout=layout,
            dense=dense,
            text_valid=self.text_valid,
            scale=scale,
            step=self.step,
            backend=self.backend,
            quantization=self.formats.get(layer),
            tail=self.tails.get(layer),
            places=self.places,
            memory=None if self.memory is None else self.memory.within(layer),
            notes=notes,
            learned=self.learned.get(layer, {}),
            beside=self.beside.pop(layer, None),
        )
        return dense(call) if self.keeps_own(layer, q, k) else self.layers[layer](call)


def begin(call: TransformerCall) -> None:
    """Make `call` the one that its owner's layers are in, until `end`."""
    _current.set(replace(call, outer=_without(_current.get(), call.owner)))


def end(owner: Any) -> None:
    """Forget the call of an owner."""
    _current.set(_without(_current.get(), owner))


def _without(call: TransformerCall | None, owner: Any) -> TransformerCall | None:
    """A call and those around it, less what an interrupt left of an owner's."""
    if call is None:
        return None
    outer = _without(call.outer, owner)
    if call.owner is owner:
        return outer
    return call if outer is call.outer else replace(call, outer=outer)


def current(owner: Any) -> TransformerCall | None:
    """The call that an owner's layers are in, in this thread; None between calls."""
    call = _current.get()
    while call is not None and call.owner is not owner:
        call = call.outer
    return call


@contextmanager
def within(call: TransformerCall | None) -> Iterator[None]:
    """Layers are in `call` for the length of a `with` block."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)
