"""Which blocks are kept, and along which order of the axes, by their share of the attention (PARO)."""

from __future__ import annotations

import torch

BUDGETS = ("head", "global")


def kept_blocks(mass: torch.Tensor, density: float, budget: str = "head") -> torch.Tensor:
    """The pairs of blocks of the largest mass; every block keeps itself.

    Args:
        mass: (..., n, n).
        density: share of all pairs of blocks that is kept, at least those on the diagonal.
        budget: `"head"`: of every map by itself; `"global"`: of all maps together, by one threshold, so that
            heads differ in density.

    Returns:
        bool like `mass`.
    """
    count = mass.shape[-1]
    diagonal = torch.eye(count, dtype=torch.bool, device=mass.device)
    ranked = mass.masked_fill(diagonal, torch.inf).flatten(-2)
    flat = ranked.reshape(1, -1) if budget == "global" else ranked.reshape(-1, count**2)
    maps = flat.shape[1] // count**2
    number = max(count * maps, min(flat.shape[1], round(density * flat.shape[1])))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept.scatter_(1, flat.topk(number, dim=1).indices, True)
    return kept.view(mass.shape)


def best_orders(mass: torch.Tensor, density: float) -> torch.Tensor:
    """Orders of the axes of each head, the best first: int64 (..., orders).

    The best is the one whose kept blocks hold the most of the attention, summed over the rows of a
    calibration, of which each has blocks of its own; of equal ones the first.

    Args:
        mass: (rows, ..., orders, n, n).
        density: share of the blocks that each map keeps.
    """
    held = torch.stack([_held(row, density) for row in mass]).sum(0)
    return torch.argsort(held, dim=-1, descending=True, stable=True)


def _held(mass: torch.Tensor, density: float) -> torch.Tensor:
    """The mass of what is kept of each map, fp64 (..., orders)."""
    return mass.double().masked_fill(~kept_blocks(mass, density), 0.0).sum((-2, -1))
