"""FreeSwim's dual path: attention in windows that takes its text from a branch that attends to everything.

A call holds its samples twice: as the window branch, and behind it, of those that are guided, as the full
branch. What windows cannot know, where in the picture they are, reaches them by the text: in cross-attention
(Wan) both branches get what the full branch's queries read, and in joint attention (FLUX, SD3, HunyuanVideo),
where text and visual keys share a softmax, its text part does, joined to the window's visual part by their
log-sum-exps:

    out_w = (e^l_w o_w + e^l_t o_t) / (e^l_w + e^l_t)

with (o_w, l_w) of the window branch's visual queries over the visual keys of their windows and (o_t, l_t) of
the full branch's visual queries over its text keys. Text queries are the full branch's, over everything.

Source: Wu et al., "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free
Ultra-High-Resolution Video Generation", 2025; the form for joint attention is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn import functional as F

from dit_accel import kernels
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout

from .call import AttentionCall, LayerAttention, ModelAttention
from .run_memory import CallMemory


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a call are of which branch: first every sample in its window branch.

    Attributes:
        batch: samples.
        guided: those whose text comes from their full branch.
        full: whether the full branch's rows of the guided samples are in the call, behind the others; if not,
            what it read is in `memory`.
        memory: what full branches read, for later steps; None where none needs it.
        text_len: text tokens of the call.
        scale: factor on the scale of attention among visual tokens, in both branches.
        dense: whether the full branch attends densely whatever its own pattern.
    """

    batch: int
    guided: slice
    full: bool
    memory: CallMemory | None
    text_len: int
    scale: float = 1.0
    dense: bool = False

    @property
    def all_guided(self) -> bool:
        return len(range(*self.guided.indices(self.batch))) == self.batch


@dataclass(frozen=True, eq=False)
class DualPath(LayerAttention):
    """One self-attention or joint layer of both branches.

    Attributes:
        window: of the window branch, over visual tokens alone.
        full: of the full branch, over all tokens.
        visual: of the visual tokens.
        rows: of the call in progress; None: between calls.
    """

    window: LayerAttention
    full: LayerAttention
    visual: TokenLayout
    rows: Rows | None = None

    @property
    def mask(self) -> BlockMask | None:
        return self.window.mask

    @property
    def density(self) -> float:
        """Of the window branch."""
        return self.window.density

    @property
    def block_density(self) -> float:
        return self.window.block_density

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + self.full.nbytes

    def of_call(self, rows: Rows, layer: str) -> DualPath:
        """What it is in one call, for one layer."""
        memory = None if rows.memory is None else rows.memory.within(layer)
        return replace(self, rows=replace(rows, memory=memory))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        batch = self.rows.batch
        window, full = of_rows(call, slice(0, batch)), of_rows(call, slice(batch, None))
        if not call.layout.text_len:
            out = self.window(self._scaled(window))
            return torch.cat([out, self._full(full)]) if self.rows.full else out
        return self._joint(window, full)

    def _joint(self, window: AttentionCall, full: AttentionCall) -> torch.Tensor:
        rows, layout = self.rows, window.layout
        visual, text = layout.visual_slice, layout.text_slice
        source = _with_guided(window, full, rows) if rows.full else window  # whose queries read the text
        parts = [self.window.with_lse(self._visual(window)), self._text_part(source)]
        out = torch.empty_like(window.q)
        out[:, :, visual] = kernels.merge(*zip(*parts, strict=True))[0]
        out[:, :, text] = _of_text_queries(source)
        if not rows.full:
            return out
        own = self._full(full)
        own[:, :, text] = out[rows.guided][:, :, text]
        return torch.cat([out, own])

    def _scaled(self, call: AttentionCall) -> AttentionCall:
        """The call with the scale of attention among visual tokens."""
        return replace(call, scale=call.factor * self.rows.scale)

    def _visual(self, call: AttentionCall) -> AttentionCall:
        """The call of its visual tokens alone."""
        q, k, v = (x[:, :, call.layout.visual_slice] for x in (call.q, call.k, call.v))
        return self._scaled(replace(call, q=q, k=k, v=v, layout=self.visual, text_valid=None))

    def _full(self, call: AttentionCall) -> torch.Tensor:
        """The full branch. Its visual queries see text at the model's own scale: keys make up for the other.

        What text queries get by that is replaced by the caller.
        """
        full = ModelAttention() if self.rows.dense else self.full
        call = replace(call, notes={})  # densities are told of the window branch
        if not call.layout.text_len:
            return full(self._scaled(call))
        keys = call.k.clone()
        keys[:, :, call.layout.text_slice] /= self.rows.scale
        call = self._scaled(replace(call, k=keys, dense=_dense))
        return full(call)

    def _text_part(self, source: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of visual queries to text keys, and its log-sum-exp; kept, or as it was kept."""
        rows = self.rows
        if rows.full or rows.memory is None:
            parts = _to_text(source)
            if rows.memory is not None:
                rows.memory.keep(tuple(part[rows.guided].detach() for part in parts))
            return parts
        kept = recalled(rows.memory)
        if rows.all_guided:
            return kept
        parts = _to_text(source)
        for part, before in zip(parts, kept, strict=True):
            part[rows.guided] = before
        return parts


@dataclass(frozen=True, eq=False)
class TextOverride(LayerAttention):
    """One cross-attention layer to text of both branches: both get what the full branch's queries read.

    Keys of an image, which image-to-video models attend to as well, are each branch's own.

    Attributes:
        rows: of the call in progress.
    """

    rows: Rows
    mask = None

    def of_call(self, rows: Rows, layer: str) -> TextOverride:
        """What it is in one call, for one layer."""
        memory = None if rows.memory is None else rows.memory.within(layer)
        return replace(self, rows=replace(rows, memory=memory))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        rows, batch = self.rows, self.rows.batch
        if call.k.shape[2] != rows.text_len:
            return call.dense(call)
        if rows.full:
            source = (
                of_rows(call, slice(batch, None))
                if rows.all_guided
                else _with_guided(of_rows(call, slice(0, batch)), of_rows(call, slice(batch, None)), rows)
            )
            out = call.dense(source)
            read = out[rows.guided]
            if rows.memory is not None:
                rows.memory.keep(read.detach())
            return torch.cat([out, read])
        if rows.memory is None:
            return call.dense(call)
        kept = recalled(rows.memory)
        if rows.all_guided:
            return kept
        out = call.dense(call)
        out[rows.guided] = kept
        return out


def recalled(memory: CallMemory):
    """What the full branch read at the latest guided step of this run.

    Raises:
        RuntimeError: there was none, as where calls come in another order than a sampler's.
    """
    kept = memory.recall()
    if kept is None:
        raise RuntimeError(
            "this call reuses what the full branch read at an earlier step of its run, and there was none; "
            "call the branches of every step in the same order, or use cache_steps=None"
        )
    return kept


def of_rows(call: AttentionCall, rows: slice) -> AttentionCall:
    """The same of some samples alone."""
    valid = None if call.text_valid is None else call.text_valid[rows]
    beside = None if call.beside is None else call.beside[rows]
    return replace(call, q=call.q[rows], k=call.k[rows], v=call.v[rows], text_valid=valid, beside=beside)


def _with_guided(window: AttentionCall, full: AttentionCall, rows: Rows) -> AttentionCall:
    """The window branch's call with the guided samples' rows of the full branch."""
    if rows.all_guided:
        return full
    joined = []
    for own, other in zip((window.q, window.k, window.v), (full.q, full.k, full.v), strict=True):
        joined.append(own.clone())
        joined[-1][rows.guided] = other
    return replace(window, q=joined[0], k=joined[1], v=joined[2])


def _dense(call: AttentionCall) -> torch.Tensor:
    """All tokens but padded text; the model's own mask is of all rows of a call and does not fit some."""
    hidden = call.hidden_keys()
    mask = None if hidden is None else ~hidden[:, None, None]
    return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)


def _of_text_queries(call: AttentionCall) -> torch.Tensor:
    """Attention of text queries to everything, at the model's own scale: (B, H, T, D)."""
    hidden = call.hidden_keys()
    mask = None if hidden is None else ~hidden[:, None, None]
    q = call.q[:, :, call.layout.text_slice]
    return F.scaled_dot_product_attention(q, call.k, call.v, attn_mask=mask, scale=call.scale)


def _to_text(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of visual queries to valid text keys, (B, H, V, D), and its log-sum-exp (B, H, V)."""
    layout = call.layout
    q = call.q[:, :, layout.visual_slice]
    k, v = (x[:, :, layout.text_slice] for x in (call.k, call.v))
    mask = whole_mask(layout.visual_len, layout.text_len, q.device)
    options = {"scale": call.scale, "text_valid": call.text_valid, "backend": call.backend}
    out, lse = kernels.block_sparse_attention(q, k, v, mask, return_lse=True, **options)
    return out, lse


@lru_cache(maxsize=32)
def whole_mask(queries: int, text: int, device: torch.device) -> BlockMask:
    """The mask of queries that all attend to all of so many keys, which may be padded text."""
    size = next(iter(kernels.block_sizes(device)))
    shape = (-(-queries // size[0]), -(-text // size[1]))
    with torch.inference_mode(False):
        chosen = torch.ones(shape, dtype=torch.bool, device=device)
        return BlockMask.from_blocks(chosen, block_size=size, seq_len=queries, kv_len=text, text=(0, text))
