"""A layer's attention as a value: the arguments of one call, and what every kind can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from dit_accel.errors import UnavailableError
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout

from .run_memory import CallMemory


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one call of one attention layer; frozen, so that nothing of a call outlives it.

    Tokens stand in the *order of the call*: text where the model has it, visual tokens as they were laid out
    where they entered the transformer.

    Attributes:
        q, k, v: (B, H, S, D).
        layout: of this layer's tokens.
        dense: the model's own attention of such a call, like q: what is computed where nothing is sparse.
        text_valid: how many text tokens of each sample are real, integers (B,); None: all.
        scale: factor on the scores, head_dim^-0.5 where None.
        step: sampler step.
        backend: kernel of `dit_accel.kernels.block_sparse_attention`.
        quantization, tail: numeric format, and what keys contribute that are not computed, as there.
        places: int64 (visual_len,), the visual token at each place of the order of the call; None where that
            is the model's own.
        memory: what the layer keeps from step to step of a run, see `dit_accel.attention.run_memory`; None
            where calls have nothing to do with each other.
        notes: takes what a kind wants to tell of a call, such as which orders heads chose.
        learned: weights of the layer that its pattern has beside the projections, by the names of
            `Pattern.learned`; what is missing is as before training.
        beside: what the pattern made of the layer's input (`Pattern.of_input`), (B, H, ...); None where it
            reads none, or has learned nothing for it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    dense: Callable[[AttentionCall], torch.Tensor]
    text_valid: torch.Tensor | None = None
    scale: float | None = None
    step: int = 0
    backend: str = "auto"
    quantization: str | None = None
    tail: str | None = None
    places: torch.Tensor | None = None
    memory: CallMemory | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    learned: Mapping[str, torch.Tensor] = field(default_factory=dict)
    beside: torch.Tensor | None = None

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale

    def at_usual_scale(self) -> AttentionCall:
        """The same scores by head_dim^-0.5, for what chooses keys by them: queries are longer or shorter."""
        if self.scale is None:
            return self
        return replace(self, q=self.q * (self.scale * self.q.shape[3] ** 0.5), scale=None)

    def of_heads(self, heads: list[int]) -> AttentionCall:
        """The same of some heads alone."""
        beside = None if self.beside is None else self.beside[:, heads]
        return replace(self, q=self.q[:, heads], k=self.k[:, heads], v=self.v[:, heads], beside=beside)

    def hidden_keys(self) -> torch.Tensor | None:
        """Which keys are padded text, bool (B, S) in the order of the call; None where none is."""
        return None if self.text_valid is None else self.layout.padding(self.text_valid)

    def of_input(self, weight: str, what: str) -> torch.Tensor | None:
        """`beside`, where the layer has the learned weight that it is made by; else None.

        Args:
            weight: its name.
            what: what `beside` is, for a message.

        Raises:
            UnavailableError: a call that did not bring it.
        """
        if weight not in self.learned:
            return None
        if self.beside is None:
            raise UnavailableError(
                f"{what} needs what this layer's queries are projected from, and this call did not bring it; "
                "call `unfuse_qkv_projections()` on the transformer, or leave `adapter` out"
            )
        return self.beside


class LayerSizes(NamedTuple):
    """Sizes of an attention layer: of a head, the number of heads, and the channels of its input."""

    head_dim: int
    heads: int = 1
    width: int = 0


class LayerAttention:
    """What one attention layer computes in a call: q, k, v of an `AttentionCall` to an output like q.

    A value without state of calls: one instance serves all calls of a geometry, from any thread.

    Attributes:
        mask: the block mask it computes under, where that is known before a call.
    """

    mask: BlockMask | None

    @property
    def density(self) -> float:
        """Computed pairs as a share of all; pooled keys are no part of a pair of tokens."""
        return 1.0 if self.mask is None else self.mask.density

    @property
    def block_density(self) -> float:
        """Pairs in computed blocks as a share of all, and pooled keys: what a kernel pays."""
        return 1.0 if self.mask is None else self.mask.block_density

    @property
    def nbytes(self) -> int:
        """Of all that it keeps."""
        return 0 if self.mask is None else self.mask.nbytes

    def pairs_beside(self, sizes: LayerSizes) -> float:
        """What a head computes beside the pairs under its mask, linear attention for example.

        As the number of pairs of tokens whose scores and weighted sums take as many multiplications and
        additions, 4 D; what it takes to choose by content is not counted.
        """
        return 0.0

    def model_orders(self) -> list[torch.Tensor]:
        """The model's token at each place of `mask`, int64 (S,): one order, or one for each kind of head."""
        return []

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        raise NotImplementedError

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and the log-sum-exp of the scaled scores, fp32 (B, H, S) in natural logarithm.

        Raises:
            UnavailableError: a kind of attention that has none.
        """
        raise UnavailableError(f"{type(self).__name__} attention returns no lse; use return_lse=False")

    def resolved(self, call: AttentionCall) -> LayerAttention:
        """The same with all that depends on content as this call decides it."""
        return self

    def of_heads(self, call: AttentionCall, heads: list[int]) -> torch.Tensor:
        """The output of some heads of a call: (B, len(heads), S, D)."""
        return self(call)[:, heads]


class ModelAttention(LayerAttention):
    """The model's own attention, dense."""

    mask = None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return call.dense(call)

    def of_heads(self, call: AttentionCall, heads: list[int]) -> torch.Tensor:
        return self(call.of_heads(heads))


class AroundAnother(LayerAttention):
    """One that changes what another computes; mask and densities are the other's.

    Attributes:
        inner: the other.
    """

    inner: LayerAttention

    @property
    def mask(self) -> BlockMask | None:
        return self.inner.mask

    @property
    def density(self) -> float:
        return self.inner.density

    @property
    def block_density(self) -> float:
        return self.inner.block_density

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def model_orders(self) -> list[torch.Tensor]:
        return self.inner.model_orders()

    def pairs_beside(self, sizes: LayerSizes) -> float:
        return self.inner.pairs_beside(sizes)
