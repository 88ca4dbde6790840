"""What a call asks for (`Problem`) and what can compute it (`Backend`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.arguments import shown
from dit_accel.masks.block_mask import BlockMask

from .tail import merged

MAX_HEAD_DIM = 256
TAILS = (None, "pooled")
Lengths = torch.Tensor | None  # of valid text, int32 (batch,), contiguous; None: no text is padded


@dataclass(frozen=True)
class Problem:
    """Everything that decides whether a backend can compute a call: all about it but its values.

    Attributes:
        device: where q, k, v and the mask are.
        dtype: of q, k and v.
        head_dim: of q, k and v.
        block_size: (queries, keys) of the mask's blocks.
        quantization: numeric format in which q, k, v are multiplied; None: their own.
        return_lse: whether the log-sum-exp is asked for.
        requires_grad: whether gradients are.
        tail: what keys contribute that are not computed, `"pooled"` or None.
        pv_threshold: from which weight on the values of a block are not added (`reference.skipped`), or None.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: tuple[int, int]
    quantization: str | None = None
    return_lse: bool = False
    requires_grad: bool = False
    tail: str | None = None
    pv_threshold: float | None = None

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, **options: Any
    ) -> Problem:
        """The problem of a call; `options` are the attributes that its tensors do not tell."""
        requires_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return cls(q.device, q.dtype, q.shape[3], mask.block_size, requires_grad=requires_grad, **options)

    def __post_init__(self):
        if not isinstance(self.device, torch.device):
            object.__setattr__(self, "device", torch.device(self.device))
        if not isinstance(self.block_size, tuple):
            object.__setattr__(self, "block_size", tuple(self.block_size))
        if self.tail not in TAILS:
            raise ValueError(f"`tail` must be 'pooled' or None, got {shown(self.tail)}")


def valid_keys(mask: BlockMask, text_valid: Lengths) -> torch.Tensor:
    """Which keys are not padded text: bool (batch or 1, 1, 1, kv_len)."""
    key = torch.arange(mask.kv_len, device=mask.device)
    if text_valid is None:
        return (key >= 0).view(1, 1, 1, -1)
    start, stop = mask.text
    return (key < start + text_valid.view(-1, 1, 1, 1)) | (key >= stop)


Attend = Callable[..., "tuple[torch.Tensor, torch.Tensor | None]"]
Gradients = Callable[..., "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute block-sparse attention. Each module of this folder that has one names it `BACKEND`.

    Attributes:
        name: by which callers ask for it.
        attend: `attend(q, k, v, mask, problem, *, scale, text_valid)` returns out, like q, and lse (batch,
            heads, seq_len), or anything where `problem.return_lse` is not set. `block_sparse_attention` has
            checked the inputs; `text_valid` is int32 (batch,), contiguous, or None.
        dtypes: of q, k and v that it takes.
        condition: why else it cannot compute a problem, or None; asked after all that is said here.
        block_sizes: block sizes worth trying on a device, the default first, with the relative time of a
            computed pair.
        automatic_on: device types on which `"auto"` considers it, None for all.
        formats: values of `quantization` that it computes, beside None.
        backward: whether it has gradients.
        gradients: what gives them from out and lse, as `native.gradients` does; None: autograd, or nothing.
        traceable: whether `torch.compile` looks into it; if not, compiled code calls it as one operator.
        own_tail: whether `attend` computes the tail; if not, and always where numbers are quantized or values
            skipped, it is computed beside it, of the numbers as given, and merged.
        skips_values: whether it takes a `pv_threshold`.
    """

    name: str
    attend: Attend
    dtypes: tuple[torch.dtype, ...]
    condition: Callable[[Problem], str | None]
    block_sizes: Callable[[torch.device], dict[tuple[int, int], float]] = lambda device: {(128, 64): 1.0}
    automatic_on: tuple[str, ...] | None = ()
    formats: tuple[str, ...] = ()
    backward: bool = False
    gradients: Gradients | None = None
    traceable: bool = False
    own_tail: bool = False
    skips_values: bool = False

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `attend`, with the tail that the problem asks for."""
        if not self.merges_tail(problem):
            return self.attend(q, k, v, mask, problem, **options)
        return merged(self.attend, q, k, v, mask, problem, **options)

    def merges_tail(self, problem: Problem) -> bool:
        """Whether the tail of the problem is computed beside it."""
        plain = problem.quantization is None and problem.pv_threshold is None
        return problem.tail is not None and not (self.own_tail and plain)

    def is_looked_into(self, problem: Problem) -> bool:
        """Whether `torch.compile` looks into it.

        It calls quantized attention, and one whose gradients are not autograd's, as one operator.
        """
        plain = problem.quantization is None and not self.merges_tail(problem)
        return self.traceable and plain and not self.recomputes(problem)

    def recomputes(self, problem: Problem) -> bool:
        """Whether the problem needs gradients, and they come from out and lse."""
        return problem.requires_grad and self.gradients is not None

    def reason(self, problem: Problem) -> str | None:
        """Why it cannot compute the problem, or None if it can."""
        if problem.quantization is not None and problem.quantization not in self.formats:
            known = f"only {', '.join(map(repr, self.formats))}" if self.formats else "nor any other"
            return f"{self.name} does not compute quantization={problem.quantization!r}, {known}"
        if problem.pv_threshold is not None and not self.skips_values:
            return f"{self.name} does not skip values; use pv_threshold=None"
        if not 1 <= problem.head_dim <= MAX_HEAD_DIM:
            return f"head_dim must be between 1 and {MAX_HEAD_DIM}, got {problem.head_dim}"
        if problem.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"{self.name} supports {names}, got {problem.dtype}"
        if problem.requires_grad and not self.backward:
            return f"{self.name} has no backward pass; use backend='auto'"
        if self.recomputes(problem) and problem.pv_threshold is not None:
            return f"{self.name} has no gradients where it skips values; use pv_threshold=None"
        if problem.requires_grad and problem.quantization is not None:
            return "numbers rounded to a few bits have no gradient; use quantization=None where one is needed"
        if not self.merges_tail(problem):
            return self.condition(problem)
        why = self.condition(replace(problem, return_lse=True))
        return why and f"{why}, by which a tail would be merged" if "lse" in (why or "") else why
