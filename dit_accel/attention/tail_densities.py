"""How much an attention with a compensated tail computes: whole blocks, and pooled keys beside them."""

from __future__ import annotations

from dit_accel.kernels import pooled_density
from dit_accel.masks.block_mask import BlockMask

from .call import LayerAttention


def mask_densities(mask: BlockMask, tail: str | None) -> tuple[float, float]:
    """Density and block density of a mask, with a tail or without.

    Pooled keys of a tail are no pairs of tokens: they are not in the first, which with a tail is that of
    whole blocks, as these are computed whole. A kernel pays for them: they are in the second.
    """
    if tail is None:
        return mask.density, mask.block_density
    return mask.with_whole_blocks().density, mask.block_density + pooled_density(mask)


def tail_densities(attention: LayerAttention, least: float = 0.0) -> tuple[float, float]:
    """Density and block density under a tail, of what is known before a call, as in `mask_densities`.

    Args:
        least: pooled keys as a share of all, of an attention whose mask a call makes.
    """
    mask = attention.mask
    if mask is None:
        return attention.density, attention.block_density + least
    return mask_densities(mask, "pooled")
