"""Attention of a layer some of whose heads are weakened: the perturbed branch of guidance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from . import head_replacements
from .call import AroundAnother, AttentionCall, LayerAttention

if TYPE_CHECKING:
    from dit_accel.guidance.perturbation import HeadPerturbation


@dataclass(frozen=True, eq=False)
class Perturbed(AroundAnother):
    """O + u (O_kind - O) for the output O of some heads of another attention.

    Attributes:
        inner: the attention whose heads are perturbed.
        perturbation: the kind and its options.
        heads: the perturbed heads.
        strengths: theirs, u, (h,).
    """

    inner: LayerAttention
    perturbation: HeadPerturbation
    heads: list[int]
    strengths: torch.Tensor

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        inner, layout, heads = self.inner.resolved(call), call.layout, self.heads
        out = inner(call)
        rows = layout.image_slice if self.perturbation.tokens == "image" else slice(0, layout.seq_len)
        other = self._other(inner, call)
        other = other if other.shape[2] == rows.stop - rows.start else other[:, :, rows]
        out = out.clone()
        out[:, heads, rows] = head_replacements.mix(out[:, heads, rows], other, self.strengths)
        return out

    def _other(self, inner: LayerAttention, call: AttentionCall) -> torch.Tensor:
        """What takes the place of the perturbed heads' output: (B, h, S, D), or its image tokens alone."""
        perturbation, heads = self.perturbation, self.heads
        if perturbation.kind == "uniform":
            return head_replacements.uniform(call.v[:, heads], call.hidden_keys())
        if perturbation.temperature is not None:
            scale = perturbation.temperature * call.factor
            return inner.of_heads(replace(call, scale=scale), heads)
        if perturbation.kind == "seg":
            q = call.q.clone()
            q[:, heads] = self._blurred(call.of_heads(heads))
            return inner.of_heads(replace(call, q=q), heads)
        if perturbation.tokens == "all":
            return call.v[:, heads]
        own, layout = call.of_heads(heads), call.layout
        hidden = call.hidden_keys()
        return head_replacements.image_identity(
            *(x[:, :, layout.image_slice] for x in (own.q, own.k, own.v)),
            *(x[:, :, layout.text_slice] for x in (own.k, own.v)),
            call.factor,
            None if hidden is None else hidden[:, layout.text_slice],
        )

    def _blurred(self, call: AttentionCall) -> torch.Tensor:
        """The queries of a call, blurred where they stand in the image."""
        q, layout, places, sigma = call.q.clone(), call.layout, call.places, self.perturbation.sigma
        visual = q[:, :, layout.visual_slice]
        if places is not None:
            visual = visual[:, :, torch.argsort(places)]
        visual = head_replacements.blur_grid(visual, layout.grid, sigma)
        q[:, :, layout.visual_slice] = visual if places is None else visual[:, :, places]
        if layout.anchor is not None:
            anchor = q[:, :, layout.anchor_slice]
            q[:, :, layout.anchor_slice] = head_replacements.blur_grid(anchor, layout.anchor, sigma)
        if self.perturbation.tokens == "all" and layout.text_len:
            text = q[:, :, layout.text_slice]
            q[:, :, layout.text_slice] = head_replacements.blur_text(text, call.text_valid, sigma)
        return q
