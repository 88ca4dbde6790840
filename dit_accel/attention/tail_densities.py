"""How much an attention with a compensated tail computes: whole blocks, and pooled keys beside them."""

from __future__ import annotations

from dit_accel.kernels import pooled_density

from .call import LayerAttention


def tail_densities(attention: LayerAttention, least: float = 0.0) -> tuple[float, float]:
    """Density and block density under a tail, of what is known before a call.

    The first is the share of pairs of a query with a key of its own, in blocks that are computed whole; the
    second what a kernel pays, in whole blocks, the means that stand for all other keys among them.

    Args:
        least: pooled keys as a share of all, of an attention whose mask a call makes.
    """
    mask = attention.mask
    if mask is None:
        return attention.density, attention.block_density + least
    return mask.with_whole_blocks().density, attention.block_density + pooled_density(mask)
