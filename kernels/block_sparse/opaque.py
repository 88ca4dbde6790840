"""The backends that need no Triton as one operator that `torch.compile` takes whole.

What they do depends on the mask's contents, which a graph must not be compiled for. An operator's arguments
are tensors, so a mask goes by number: `announce` it before compiled code runs.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch

from dit_accel.blockmask import BlockMask

from . import flex, gather, native, reference

BACKENDS = {"native": native, "gather": gather, "flex": flex, "reference": reference}

NUMBER = "number of the operator"  # where a mask's cache keeps it, an int64 tensor
masks: WeakValueDictionary[int, BlockMask] = WeakValueDictionary()  # keeps none of them alive
_numbers = count()


def announce(mask: BlockMask) -> None:
    """Make a mask known to the operator for as long as it lives; cheap when it already is."""
    number = mask.cache.get(NUMBER)
    if number is None or masks.get(int(number)) is not mask:  # new, or a copy with the number of another
        number = next(_numbers)
        with torch.inference_mode(False):  # what is kept must be usable under autograd later
            mask.cache[NUMBER] = torch.tensor(number, device="cpu")
        masks[number] = mask


def is_announced(mask: BlockMask) -> bool:
    return NUMBER in mask.cache


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    backend: str,
    scale: float,
    text_valid: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the backend of that name returns, without gradients, for a mask that `is_announced`."""
    out, lse = _attention(q, k, v, mask.cache[NUMBER], text_valid, scale, return_lse, backend)
    return out, lse if return_lse else None


@torch.library.custom_op("dit_accel::block_sparse_attention_plain", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    number: torch.Tensor,
    text_valid: torch.Tensor | None,
    scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = masks[int(number)]
    out, lse = BACKENDS[backend].attention(
        q, k, v, mask, scale=scale, text_valid=text_valid, return_lse=return_lse
    )
    return out.contiguous(), q.new_empty(0) if lse is None else lse.contiguous()


@_attention.register_fake
def _(q, k, v, number, text_valid, scale, return_lse, backend):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=dtype) if return_lse else q.new_empty(0)
    return q.new_empty(q.shape), lse
