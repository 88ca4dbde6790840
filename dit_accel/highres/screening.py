"""Regional screening: which words of the prompt a region's tokens read, and keys hidden that they do not.

What each text token receives from the picture's queries is taken down in the native pass; in a region that
gives a text token less than a share of what it gets in the whole picture, its queries do not see the token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from dit_accel.attention.branch_names import branch_name
from dit_accel.attention.call import AroundAnother, AttentionCall, LayerAttention
from dit_accel.attention.layer_masks import LayerMasks
from dit_accel.runtime.switching import accelerated

from .proportional import OfHeads
from .wrapping import enabled, in_all_layers

_QUERIES = 512  # whose scores are made at a time


@dataclass(eq=False)
class Notes:
    """What text tokens received: the sum over layers, heads and steps of probabilities, fp32 (B, V, T)."""

    total: torch.Tensor | None = None

    def add(self, call: AttentionCall) -> None:
        """Takes down one layer of a conditional call."""
        if "uncond" in (branch_name() or ""):
            return
        received = text_probabilities(call)
        if call.places is not None:
            received = received[:, torch.argsort(call.places)]
        self.total = received if self.total is None else self.total + received


def text_probabilities(call: AttentionCall) -> torch.Tensor:
    """Dense attention of visual queries to text keys, the mean over heads: fp32 (B, V, T), as in the call."""
    layout, hidden = call.layout, call.hidden_keys()
    keys, found = call.k.float().transpose(-1, -2), []
    for q in call.q[:, :, layout.image_slice].split(_QUERIES, dim=2):
        scores = q.float() @ keys * call.factor
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        found.append(scores.softmax(-1)[..., layout.text_slice].mean(1))
    return torch.cat(found, dim=1)


@dataclass(frozen=True, eq=False)
class _Noted(AroundAnother):
    inner: LayerAttention
    notes: Notes

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        if call.layout.text_len:
            self.notes.add(call)
        return self.inner(call)


@dataclass(frozen=True)
class _Noting(OfHeads):
    notes: Notes = field(default_factory=Notes, compare=False)

    def layer_attention(self, heads: Sequence[Any], masks: LayerMasks) -> LayerAttention:
        return _Noted(self.inner(masks), self.notes)


@contextmanager
def noting(pipe: Any, watched: list[torch.Tensor]) -> Iterator[None]:
    """Takes down what text receives, into `watched` at the end of a `with` block."""
    notes = Notes()
    recipe = in_all_layers(pipe, enabled(pipe), lambda heads: _Noting(heads, notes))
    with accelerated(pipe, recipe):
        yield
    if notes.total is not None:
        watched.append(notes.total.cpu())


@dataclass(eq=False)
class Screen:
    """Which text tokens are hidden from the visual queries of each tile, bool (B, tiles, T).

    Attributes:
        now: of the call in progress, bool (B', T), B' its samples; None: nothing is hidden.
    """

    hidden: torch.Tensor
    now: torch.Tensor | None = None
    _samples: slice = field(default_factory=lambda: slice(None))

    def begin(self, tile: int, conditional: slice | None) -> None:
        """The next calls are of a tile, with these conditional samples; None: there is none."""
        self.now = None if conditional is None else self.hidden[:, tile]
        self._samples = conditional or slice(None)

    def end(self) -> None:
        self.now = None

    def keys(self, call: AttentionCall) -> torch.Tensor | None:
        """Which keys are hidden from visual queries, bool (B', S); None: none beside padding."""
        if self.now is None or not call.layout.text_len or not self.now.any():
            return None
        padding = call.hidden_keys()
        hidden = torch.zeros(len(call.q), call.layout.seq_len, dtype=torch.bool, device=call.q.device)
        hidden[self._samples, call.layout.text_slice] = self.now.to(call.q.device)
        return hidden if padding is None else hidden | padding


def screened(received: torch.Tensor, within: Sequence[torch.Tensor], threshold: float) -> torch.Tensor:
    """Which text tokens receive less than `threshold` of their mean from the tokens of each tile.

    Args:
        received: (B, V, T).
        within: of each tile which of the V tokens, bool (V,).

    Returns:
        bool (B, tiles, T).
    """
    everywhere = received.mean(1)
    return torch.stack([received[:, inside].mean(1) < threshold * everywhere for inside in within], dim=1)


@dataclass(frozen=True, eq=False)
class _Screened(AroundAnother):
    inner: LayerAttention
    screen: Screen

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        hidden = self.screen.keys(call)
        if hidden is None:
            return self.inner(call)
        visual, text = call.layout.image_slice, call.layout.text_slice
        padding = call.hidden_keys()
        out = torch.empty_like(call.q)
        for rows, mask in ((visual, hidden), (text, padding)):
            shown = None if mask is None else ~mask[:, None, None]
            out[:, :, rows] = F.scaled_dot_product_attention(
                call.q[:, :, rows], call.k, call.v, attn_mask=shown, scale=call.scale
            )
        return out


@dataclass(frozen=True)
class _Screening(OfHeads):
    screen: Screen | None = field(default=None, compare=False)

    def layer_attention(self, heads: Sequence[Any], masks: LayerMasks) -> LayerAttention:
        assert self.screen is not None  # it is made with one
        return _Screened(self.inner(masks), self.screen)


@contextmanager
def screening(pipe: Any, screen: Screen) -> Iterator[None]:
    """Visual queries do not see what the screen hides, for the length of a `with` block."""
    recipe = in_all_layers(pipe, enabled(pipe), lambda heads: _Screening(heads, screen))
    with accelerated(pipe, recipe):
        yield
