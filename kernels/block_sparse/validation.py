"""What `block_sparse_attention` asks of its inputs, checked before any work starts."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.masks.block_mask import BlockMask

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)

# (version, text length) for which the values of a tensor on an accelerator were seen to be in range
_in_range: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> None:
    """Raise ValueError or TypeError unless q, k, v and the mask fit each other."""
    if not isinstance(mask, BlockMask):
        raise TypeError(f"`mask` must be a dit_accel.BlockMask, got {type(mask).__name__}")
    for name, x, field in (("q", q, "seq_len"), ("k", k, "kv_len"), ("v", v, "kv_len")):
        length = getattr(mask, field)
        if x.ndim != 4:
            raise ValueError(f"`{name}` must have shape (batch, heads, seq, head_dim), got {tuple(x.shape)}")
        if x.shape[2] != length:
            raise ValueError(
                f"`{name}` has {x.shape[2]} tokens but the mask was built for {field}={length}; "
                "build the mask for this layout"
            )
        if x.shape[:2] != q.shape[:2] or x.shape[3] != q.shape[3]:
            raise ValueError(
                f"`{name}` must agree with q in batch, heads and head_dim, got {tuple(x.shape)} against "
                f"{tuple(q.shape)}; repeat shared key and value heads first"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if mask.device != q.device:
        raise ValueError(
            f"`mask` is on {mask.device} but q is on {q.device}; move it once with mask.to({str(q.device)!r})"
        )
    mask.check_heads(*q.shape[:2])
    if not torch.compiler.is_compiling():
        mask.validate()


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores.

    Raises:
        ValueError: not a finite number.
    """
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, Real) or not -math.inf < scale < math.inf:
        raise ValueError(f"`scale` must be a finite number or None, got {scale!r}")
    return float(scale)


def checked_pv_threshold(threshold: float | None) -> float | None:
    """The threshold as a float.

    Raises:
        ValueError: no finite number above 0.
    """
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 < threshold < math.inf:
        raise ValueError(f"`pv_threshold` must be a finite number above 0 or None, got {threshold!r}")
    return float(threshold)


def checked_text_valid(
    text_valid: torch.Tensor | None, q: torch.Tensor, length: int, of: str = "mask"
) -> torch.Tensor | None:
    """The lengths as every backend takes them: int32 (batch,), contiguous, beside q.

    Args:
        text_valid: as they were given.
        q: queries, (batch, ...).
        length: how many text tokens there are.
        of: in what, for messages.

    Raises:
        ValueError: not one integer between 0 and the text's length for each sample, or no text.
    """
    if text_valid is None:
        return None
    if length == 0:
        raise ValueError(f"`text_valid` was given but the {of} has no text; use a layout with text_len > 0")
    if not isinstance(text_valid, torch.Tensor):
        text_valid = torch.as_tensor(text_valid, device="cpu")
    if text_valid.dtype not in INTEGERS or text_valid.shape != q.shape[:1]:
        got = f"{text_valid.dtype} {tuple(text_valid.shape)}"
        raise ValueError(f"`text_valid` must be integers of shape ({q.shape[0]},), got {got}")
    if (
        not torch.compiler.is_compiling()
    ):  # compiled code has no values; no kernel reads out of bounds for them
        _check_range(text_valid, length, of)
    if text_valid.device != q.device:
        text_valid = text_valid.to(q.device)
    return text_valid.int().contiguous()


def _check_range(text_valid: torch.Tensor, length: int, of: str) -> None:
    """Raise ValueError for lengths out of range.

    A tensor on an accelerator is waited for when first seen, or changed, and not in every layer.
    """
    seen = None
    if not text_valid.is_cpu:
        seen = (0 if text_valid.is_inference() else text_valid._version, length)
        if text_valid.is_meta or _in_range.get(text_valid) == seen:
            return
    wrong = [n for n in text_valid.tolist() if not 0 <= n <= length]
    if wrong:
        raise ValueError(
            f"`text_valid` must be between 0 and the {length} text tokens of the {of}, got {wrong[0]}"
        )
    if seen:
        _in_range[text_valid] = seen
