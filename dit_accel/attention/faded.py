"""Attention to padded text that counts less than other keys, where a model does not hide it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dit_accel.errors import UnavailableError
from dit_accel.kernels import block_sparse_attention, merge

from .call import AroundAnother, AttentionCall, LayerAttention
from .dual_path import whole_mask


@dataclass(frozen=True, eq=False)
class Faded(AroundAnother):
    """What another computes without padded text, merged with attention to padded text.

    With m of a token 0 where it is padded text and 1 elsewhere, m_i m_j is added to the scaled score of query
    i and key j: what PyTorch's attention makes of a mask of zeros and ones that is not of booleans. As adding
    1 to all scores of a row changes nothing, it is 1 less at padded keys, for queries that are not padding
    themselves; the log-sum-exp is that of these scores.

    Attributes:
        inner: the other, which has a log-sum-exp.
        padded: how many text tokens of each sample are padding, integers (B,).
    """

    inner: LayerAttention
    padded: torch.Tensor

    def resolved(self, call: AttentionCall) -> LayerAttention:
        return replace(self, inner=self.inner.resolved(call))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return self.with_lse(call)[0]

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            own = self.inner.with_lse(call)
        except UnavailableError as error:
            raise UnavailableError(
                "padded text is attended to under this call's mask of numbers, and is joined to the rest by "
                "a log-sum-exp; give `prompt_attention_mask` as booleans, which hide it, or use another "
                f"pattern ({error})"
            ) from error
        outs, lses = zip(own, self._to_padded(call), strict=True)
        return merge(outs, lses)

    def _to_padded(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of all queries to padded text, like q, and its log-sum-exp (B, H, S)."""
        layout, hidden = call.layout, call.hidden_keys()
        assert hidden is not None  # a call without padded text has none that could fade
        k, v = (x[:, :, layout.text_slice].flip(2) for x in (call.k, call.v))  # padding first
        out, lse = block_sparse_attention(
            call.q,
            k,
            v,
            whole_mask(layout.seq_len, layout.text_len, call.q.device),
            scale=call.scale,
            text_valid=self.padded,
            return_lse=True,
            backend=call.backend,
        )
        return out, lse - (~hidden[:, None]).to(lse.dtype)
