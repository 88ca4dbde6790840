"""Blocks and their tiles of bits: which sizes are usable, which blocks always need a tile, packed bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_accel.arguments import shown

LARGEST_BLOCK = 4096  # tokens; a tile of bits then has 2 MiB

# number of ones in every byte
POPCOUNT = torch.tensor([bin(i).count("1") for i in range(256)], dtype=torch.int64, device="cpu")


def check_block_size(block_size: tuple[int, int]) -> None:
    """Raise ValueError unless (query, key) block sizes are positive multiples of 16 and 8, and not huge."""
    sizes: Sequence[int] = block_size if isinstance(block_size, (tuple, list)) else []
    whole = len(sizes) == 2 and all(type(n) is int and 0 < n <= LARGEST_BLOCK for n in sizes)
    if not whole or sizes[0] % 16 or sizes[1] % 8:
        raise ValueError(
            f"`block_size` must be (a multiple of 16, a multiple of 8), at most {LARGEST_BLOCK} each, got "
            f"{shown(block_size)}"
        )


def check_text(text: tuple[int, int], kv_len: int) -> None:
    """Raise ValueError unless `text` is the (start, stop) of some of the keys, or of none."""
    if len(text) != 2 or any(type(n) is not int for n in text) or not 0 <= text[0] <= text[1] <= kv_len:
        raise ValueError(f"`text` must be (start, stop) within the {kv_len} keys, got {text!r}")


def unmaskable(
    kv_len: int, size: int, text: tuple[int, int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Key blocks of `size` never to be listed as full, which touch text or reach past kv_len: int64 (n,).

    Made on the device, which is not waited for.
    """
    first, stop = (text[0] // size, -(-text[1] // size)) if text[1] > text[0] else (0, 0)
    whole = kv_len // size
    cut = range(whole, whole + (kv_len % size > 0 and not first <= whole < stop))
    return torch.cat([torch.arange(r.start, r.stop, device=device) for r in (range(first, stop), cut)])


def pack_bits(blocks: torch.Tensor) -> torch.Tensor:
    """Bool (..., bk) to uint8 (..., bk / 8), least significant bit first."""
    weights = (1 << torch.arange(8, device=blocks.device)).to(torch.uint8)
    return (blocks.unflatten(-1, (-1, 8)).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (..., n) to bool (..., 8 n), the inverse of `pack_bits`."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> bits & 1).bool().flatten(-2)


def border_tiles(
    seq_len: int, kv_len: int, block_size: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Tiles that attend to all that exists: uint8 (4, bq, bk / 8).

    Tile 0 is of a block inside, 1 of one that reaches past kv_len, 2 past seq_len, 3 past both.
    """
    exists = []
    for length, size in zip((seq_len, kv_len), block_size, strict=True):
        place = torch.arange(size, device=device)
        exists.append(torch.stack([place < size, place < (length % size or size)]))
    rows, columns = exists
    return pack_bits((rows[:, None, :, None] & columns[None, :, None]).flatten(0, 1))
