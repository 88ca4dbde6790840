"""Reading and moving the tokens of a call: patches of latents, lengths of padded text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dit_accel.bounded_dict import make_room
from dit_accel.masks.layout import TokenLayout

_TENSORS_KEPT = 8
Grid = tuple[int, int, int]
Permute = Callable[[torch.Tensor, int], torch.Tensor]  # (tensor, dimension of the visual tokens) -> reordered


def move_patches(
    latents: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int], move: Permute
) -> torch.Tensor:
    """Latents (B, C, F, H, W), or (B, C, H, W) of images, with their patches moved to other places.

    There is one patch per token. Rows and columns that fill no patch are cut off, as the models do.
    """
    if latents.ndim == 4:
        return move_patches(latents.unsqueeze(2), grid, patch, move).squeeze(2)
    (f, h, w), (pf, ph, pw) = grid, patch
    latents = latents[:, :, : f * pf, : h * ph, : w * pw]
    batch, channels = latents.shape[:2]
    patches = latents.reshape(batch, channels, f, pf, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    tokens = move(patches.reshape(batch, f * h * w, -1), 1)
    patches = tokens.view(batch, f, h, w, channels, pf, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return patches.reshape(batch, channels, f * pf, h * ph, w * pw)


def move_image(x: torch.Tensor, dim: int, layout: TokenLayout, move: Permute) -> torch.Tensor:
    """x with the picture's tokens moved; those of the layout's anchor, which stand behind, stay in place."""
    return move_part(x, dim, slice(0, layout.visual_len), move)


def anchor_of(grids: Sequence[Grid]) -> Grid | None:
    """One grid for tokens of several that are attended densely, such as reference images; None of none.

    Grids of one height and width are frames of it; of others all tokens are one row, which says their number
    and no longer their places.
    """
    if not grids:
        return None
    frames, sides = sum(grid[0] for grid in grids), {grid[1:] for grid in grids}
    return (frames, *sides.pop()) if len(sides) == 1 else (1, 1, sum(map(math.prod, grids)))


def move_part(x: torch.Tensor, dim: int, part: slice, move: Permute) -> torch.Tensor:
    """x with the tokens of one part moved, and those before and behind it left in place."""
    if part.start == 0 and part.stop == x.shape[dim]:
        return move(x, dim)
    before, tokens, behind = x.tensor_split((part.start, part.stop), dim=dim)
    return torch.cat([before, move(tokens, dim), behind], dim=dim)


def grid_positions(
    latents: torch.Tensor, patch: Sequence[int], dims: Sequence[int]
) -> list[tuple[torch.Tensor, int]]:
    """Of each axis of latents (B, C, F, H, W), the place (S,) of every token on it, and a dimension."""
    axes = [
        torch.arange(n // p, device=latents.device) for n, p in zip(latents.shape[2:], patch, strict=True)
    ]
    places = torch.cartesian_prod(*axes).view(-1, len(axes))
    return list(zip(places.unbind(1), dims, strict=True))


def read_once(memo: dict, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
    """`read(tensor)`, kept in `memo` for the calls to come.

    A run passes the same few tensors at all its steps: reading them once means no device synchronisation per
    step.
    """
    version = None if tensor.is_inference() else tensor._version
    kept, kept_version, value = memo.get(id(tensor), (None, None, None))
    if kept is not tensor or kept_version != version or version is None:
        make_room(memo, _TENSORS_KEPT)
        with torch.inference_mode(False):  # what stays must be usable under autograd later
            value = read(tensor)
        memo[id(tensor)] = (tensor, version, value)
    return value


def valid_lengths(mask: torch.Tensor, name: str = "encoder_attention_mask") -> torch.Tensor:
    """How many text tokens of each sample are valid, int32 (B,), from a mask (B, T) of ones, then zeros.

    `name` is what the mask is called in the transformer's forward.

    Raises:
        ValueError: padding that does not come last.
    """
    valid = mask.sum(dim=1, dtype=torch.int32)
    first = torch.arange(mask.shape[1], device=mask.device) < valid[:, None]
    if not torch.equal(mask, first.to(mask.dtype)):
        raise ValueError(
            f"`{name}` must be ones followed by zeros: accelerated layers take padded text by "
            'its length; tokenize with padding_side="right", or `dit_accel.disable` it for such calls'
        )
    return valid
