"""The oracle of AnyFlow-FAR's masks: by loops over tokens, some of which stand for several of the video's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest import mock

import torch
import torch.nn.functional as F


def keys_of(
    grid: tuple[int, int, int], partition: Sequence[int], coarse: int
) -> Iterator[tuple[int, list[int]]]:
    """Of each key of a call the chunk, and the tokens of the grid of the whole video that it stands for.

    Args:
        grid: of the whole video.
        partition: frames of each chunk that there is.
        coarse: how many of these have tokens of 2 x 2 others.
    """
    _, height, width = grid
    frames = [chunk for chunk, n in enumerate(partition) for _ in range(n)]
    for frame, chunk in enumerate(frames):
        side = 2 if chunk < coarse else 1
        for row in range(0, height, side):
            for column in range(0, width, side):
                group = [(row + y, column + x) for y in range(side) for x in range(side)]
                yield chunk, [(frame * height + h) * width + w for h, w in group]


def chunk_mask(
    whole: torch.Tensor, grid: tuple[int, int, int], partition: Sequence[int], coarse: int, alone: bool
) -> torch.Tensor:
    """What a mask of the whole video (..., S, S) is in a call: bool (..., queries, keys).

    Args:
        alone: whether queries are those of the last chunk.
    """
    chunks, groups = zip(*keys_of(grid, partition, coarse), strict=True)
    chunk = torch.tensor(chunks)
    stands_for = torch.zeros(len(groups), whole.shape[-1])
    for row, group in zip(stands_for, groups, strict=True):
        row[group] = 1
    mask = (stands_for @ whole.float() @ stands_for.T > 0) & (chunk[:, None] >= chunk)
    return mask[..., chunk == chunk[-1], :] if alone else mask


class MaskedCausalProcessor:
    """AnyFlow-FAR's processor itself under a dense mask of a video of `GRID` tokens, in chunks of a frame."""

    GRID = (3, 6, 8)

    def __init__(self, original, mask: torch.Tensor):
        self.original, self.mask = original, mask

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        rotary_emb=None,
        kv_cache=None,
        kv_cache_flag=None,
    ):
        _, height, width = self.GRID
        writes, chunks = kv_cache_flag["is_cache_step"], kv_cache_flag["num_cached_chunks"] + 1
        past = kv_cache_flag["num_compressed_tokens" if writes else "num_cached_compressed_tokens"]
        coarse = past // (height // 2 * width // 2)
        mask = chunk_mask(self.mask, self.GRID, [1] * chunks, coarse, alone=not writes)

        def masked(query, key, value, scale=None, **options):
            queries, keys = (x.shape[1] - n for x, n in zip((query, key), mask.shape[-2:], strict=True))
            filled = F.pad(F.pad(mask, (0, keys), value=not writes), (0, 0, 0, queries), value=True)
            qkv = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(*qkv, attn_mask=filled, scale=scale).transpose(1, 2)

        names = type(self.original).__call__.__globals__
        with mock.patch.dict(names, dispatch_attention_fn=masked):
            return self.original(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                rotary_emb,
                kv_cache,
                kv_cache_flag,
            )
