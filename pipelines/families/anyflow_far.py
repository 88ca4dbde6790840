"""AnyFlow-FAR: Wan made autoregressive, whose chunks of frames attend to a cache of the keys of earlier ones.

A chunk attends to [the coarse past, of 4 x 4 latents a token; the last chunks in full; itself], and, as calls
are filled up to a multiple of 128 queries without a mask, to as many keys of zeros, as the released weights
were made with: masks keep those. Between chunks the whole past is encoded once more, chunk-causally, to write
the cache. `ChunkLayout` says all of it, so that patterns know which frames keys are of.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from dit_accel.attention.call import AroundAnother, AttentionCall, LayerAttention
from dit_accel.attention.masked import Masked
from dit_accel.errors import UnavailableError
from dit_accel.kernels import default_block_size
from dit_accel.masks.chunk_layout import ChunkLayout
from dit_accel.patterns import ChunkGrowth, Dense, Pattern
from dit_accel.patterns.base import StaticPattern

from .base import Family, Fill
from .processors import DISPATCH, Reused
from .registry import register

if TYPE_CHECKING:
    from dit_accel.recipe.recipe import Recipe

_FILLED_UP = 128  # to a multiple of so many queries


class CausalProcessor(Reused):
    """Whose mask, of flex attention, is that of the layout."""

    knows_mask = True

    @property
    def _SUPPORTED_BACKENDS(self) -> tuple:
        """Among which diffusers' code looks for `_attention_backend`, which is `itself` in the copy of it."""
        return (self,) if self._attention_backend in self.original._SUPPORTED_BACKENDS else ()

    def dense_in_graph(self, call: AttentionCall, attn_mask: torch.Tensor | None) -> torch.Tensor:
        """The same to rounding by other functions, as flex attention cannot run in an operation."""
        if call.layout is None:
            return self.dense(call, attn_mask)
        if call.layout.last_alone:
            return F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)
        causal = WithoutPadding(_causal(call.layout, call.q.device))
        return causal(replace(call, backend="auto", quantization=None, tail=None))


@lru_cache(maxsize=16)
def _causal(layout: ChunkLayout, device: torch.device) -> Masked:
    """All that tokens of a layout see."""
    return Masked(Dense().block_mask(layout, default_block_size(device), "raster", device))


@dataclass(frozen=True, eq=False)
class WithoutPadding(AroundAnother):
    """What another computes of the tokens that there are, in a call that is filled up."""

    inner: LayerAttention

    def resolved(self, call: AttentionCall) -> LayerAttention:
        return replace(self, inner=self.inner.resolved(_tokens(call)))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        out = self.inner(_tokens(call))
        return F.pad(out, (0, 0, 0, call.q.shape[2] - out.shape[2]))

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.inner.with_lse(_tokens(call))
        more = call.q.shape[2] - out.shape[2]
        return F.pad(out, (0, 0, 0, more)), F.pad(lse, (0, more), value=-torch.inf)


def _tokens(call: AttentionCall) -> AttentionCall:
    """The call without what it is filled up with, but for the keys that are attended to."""
    queries, keys = call.layout.seq_len, call.layout.kv_len
    return replace(call, q=call.q[:, :, :queries], k=call.k[:, :, :keys], v=call.v[:, :, :keys])


@register
class AnyFlowFAR(Family):
    """Latents come frame by frame (B, F, C, H, W); a run of sampler steps is that of one chunk."""

    name = "anyflow-far"
    transformer = "AnyFlowFARTransformer3DModel"
    originals = ("AnyFlowCausalAttnProcessor",)
    processor = CausalProcessor
    stays_dense = "cross-attention to text; keys of zeros that calls are filled up with"
    moves_tokens = False
    parallel_refusal = "each process would need the keys of all others in its cache"
    distillation_refusal = "each chunk is given those before it"
    calibration_refusal = "its chunks attend to keys of a cache, more of them from chunk to chunk"

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block.attn1 for i, block in enumerate(transformer.blocks)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.blocks,)

    def text_layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}.attn2": block.attn2 for i, block in enumerate(transformer.blocks)}

    def between_steps(self, inputs: dict[str, Any]) -> bool:
        return _flag(inputs).get("is_cache_step", False)

    def kept_between(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        return None if inputs.get("kv_cache") is None else inputs["kv_cache"][0]["full_cache"]

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> ChunkLayout:
        """Frames to come are as the cache has room for them: the model's `chunk_partition`, if that fits.

        Raises:
            UnavailableError: clean frames beside noisy ones.
            ValueError: an `attention_mask` of other chunks than the call's, or of another kind.
        """
        if inputs.get("clean_hidden_states") is not None:
            raise UnavailableError(
                "`clean_hidden_states`, of training with clean and noisy frames side by side, are not "
                "supported in accelerated layers; leave them out, or `dit_accel.disable` it for such calls"
            )
        config, present = transformer.config, tuple(inputs["chunk_partition"])
        rows, columns = inputs["hidden_states"].shape[3:]
        size = rows // config.patch_size[1], columns // config.patch_size[2]
        reads = inputs.get("kv_cache") is not None and not self.between_steps(inputs)
        layout = _layout(
            size,
            _all_chunks(config, present, size, inputs.get("kv_cache")),
            len(present),
            full=config.full_chunk_limit - self.between_steps(inputs),
            group=_group(config),
            reads=reads,
        )
        mask = inputs.get("attention_mask")
        if mask is not None and not reads:  # a call that reads the cache has none
            _check_mask(mask, layout)
        return layout

    def around(
        self, attentions: dict[str, LayerAttention], inputs: dict[str, Any], memo: dict
    ) -> dict[str, LayerAttention]:
        return {name: WithoutPadding(own) for name, own in attentions.items()}

    def recipe_refusal(self, recipe: Recipe) -> str | None:
        if recipe.guidance is not None:
            return (
                "its calls share a cache of keys, and the perturbed branch of `guidance` would need another; "
                "use guidance=None"
            )
        tails = recipe.tail.values() if isinstance(recipe.tail, dict) else [recipe.tail]
        if tail := next(filter(None, tails), None):
            return f"`tail={tail!r}` would let chunks see frames to come, which it hides; use tail=None"
        variants = (variant for pattern in recipe.patterns for variant in pattern.variants)
        return next(filter(None, map(_refusal, variants)), None)

    # -- what is known before a run --------------------------------------------------------------------------

    video = True
    highres_refusal = "its positions beyond native size are not described"
    planned_call = (
        "a step of the last chunk, of which queries are counted as tokens: earlier chunks have less past; "
        "the call after each chunk that writes the cache is not counted"
    )

    def patch(self, config: Any) -> tuple[int, int, int]:
        return tuple(config.patch_size)

    def planned_layout(self, grid: tuple[int, int, int], text_len: int) -> ChunkLayout:
        """Of the last chunk, with the limits of the published models."""
        chunks = _usual_chunks(grid[0])
        return _layout(grid[1:], chunks, len(chunks), full=3, group=(2, 2), reads=True)

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, Any]:
        chunks, full = _usual_chunks(grid[0]), config.full_chunk_limit
        latents = [n * p for n, p in zip(grid[1:], config.patch_size[1:], strict=True)]
        few, heads = _group(config), (config.num_attention_heads, config.attention_head_dim)
        kept = {
            "full_cache": full * max(chunks) * grid[1] * grid[2],
            "compressed_cache": max(0, len(chunks) - full + 1)
            * max(chunks)
            * (grid[1] // few[0])
            * (grid[2] // few[1]),
        }
        caches = {name: fill(2, 1, heads[0], tokens, heads[1]) for name, tokens in kept.items()}
        return {
            "hidden_states": fill(1, chunks[-1], config.in_channels, *latents),
            "timestep": fill(1, chunks[-1]).fill_(500),
            "r_timestep": fill(1, chunks[-1]).fill_(400),
            "encoder_hidden_states": fill(1, text_len, config.text_dim),
            "chunk_partition": list(chunks),
            "kv_cache": dict.fromkeys(range(config.num_layers), caches),
            "kv_cache_flag": {"num_cached_chunks": len(chunks) - 1, "is_cache_step": False},
        }

    def countable(self, transformer: Any) -> AbstractContextManager[Any]:
        """Flex attention takes no tensors on the meta device; PyTorch's own has as many FLOPs."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        module = importlib.import_module(type(transformer).__module__)
        return mock.patch.object(module, DISPATCH, attend)


def _flag(inputs: dict[str, Any]) -> dict[str, Any]:
    return {} if inputs.get("kv_cache") is None else inputs["kv_cache_flag"]


def _all_chunks(config: Any, present: tuple[int, ...], size: tuple[int, int], cache: Any) -> tuple[int, ...]:
    """Frames of each chunk of the whole video, of which a call tells those that there are so far.

    Pipelines make a cache for all of them: of their number and the longest.
    """
    whole = tuple(config.chunk_partition)
    begins = whole[: len(present)] == present
    if cache is None:
        return whole if begins else present
    full, coarse = (cache[0][f"{kind}_cache"].shape[3] for kind in ("full", "compressed"))
    few, limit = _group(config), config.full_chunk_limit
    longest = full // (limit * size[0] * size[1])
    row = max(1, longest * (size[0] // few[0]) * (size[1] // few[1]))
    number = coarse // row + limit - 1
    if begins and (longest, number) == (max(whole), len(whole)):
        return whole
    if not coarse:  # nor does it say how many
        return present
    return (*present, *[longest] * (number - len(present)))


def _check_mask(mask: Any, layout: ChunkLayout) -> None:
    """Looks at each frame's first and last token, and at some between them.

    Raises:
        ValueError: a mask that is not flex attention's of these chunks.
    """
    from torch.nn.attention.flex_attention import BlockMask  # which imports much

    use = (
        "leave it out, or take that of `build_attention_mask`, with the call's `chunk_partition` and `mode`, "
        "or `dit_accel.disable` it for such calls"
    )
    if not isinstance(mask, BlockMask):
        raise ValueError(f"`attention_mask` must be flex attention's, got {type(mask).__name__}; {use}")
    device = mask.kv_num_blocks.device
    ends = torch.tensor(layout.frame_tokens, dtype=torch.int64, device="cpu").cumsum(0)
    tokens = layout.tokens + layout.padding
    some = torch.arange(0, tokens, _FILLED_UP // 2, device="cpu")
    places = torch.cat([ends - 1, ends.clamp(max=tokens - 1), some]).unique()
    chunk = layout.chunk_of_tokens
    known = chunk[places.clamp(max=len(chunk) - 1)]
    there = places < len(chunk)
    expected = (known[:, None] >= known) & there[:, None] & there
    q, k, none = places.to(device)[:, None], places.to(device), torch.zeros_like(places, device=device)
    same = tuple(mask.seq_lengths) == (tokens, tokens)
    if not same or not torch.equal(mask.mask_mod(none[0], none[0], q, k).cpu(), expected):
        raise ValueError(f"`attention_mask` hides other tokens than those of the call's chunks; {use}")


def _group(config: Any) -> tuple[int, int]:
    """Rows and columns of tokens that a coarse one stands for."""
    (_, *coarse), (_, *fine) = config.compressed_patch_size, config.patch_size
    return coarse[0] // fine[0], coarse[1] // fine[1]


def _layout(
    size: tuple[int, int],
    chunks: tuple[int, ...],
    present: int,
    *,
    full: int,
    group: tuple[int, int],
    reads: bool,
) -> ChunkLayout:
    """Of a call with so many chunks, of which the last `full` are kept in full."""
    grid, coarse = (sum(chunks), *size), max(0, present - full)
    layout = ChunkLayout(grid, chunks=chunks, present=present, coarse=coarse, group=group, last_alone=reads)
    more = -layout.seq_len % _FILLED_UP
    return replace(layout, zeros=more if reads else 0, padding=more)


def _usual_chunks(frames: int) -> tuple[int, ...]:
    """Chunks of the published models: one frame, then three at a time."""
    whole, rest = divmod(frames - 1, 3)
    return (1, *[3] * whole, *([rest] if rest else []))


def _refusal(pattern: Pattern) -> str | None:
    """Why a pattern has no meaning between a chunk and the keys of its past, with the remedy, or None."""
    if isinstance(pattern, ChunkGrowth):
        sees_all = "its chunks see all before them; use window=None"
        return None if pattern.window is None else f"{pattern} hides frames, and {sees_all}"
    use = "use `ChunkGrowth`, or a static pattern such as `Radial` or `Neighborhood`"
    if not isinstance(pattern, StaticPattern):
        return f"{pattern} takes queries and keys for the same tokens, and keys here are of a cache; {use}"
    if pattern.hides:
        return f"{pattern} hides frames to come, as the model itself does by its chunks; use what is within"
    if any(variant.pools for variant in pattern.variants):
        return f"{pattern} pools keys of whole grids, and the past is in part coarse already; {use}"
    if pattern.per_head or pattern.own_tail:
        return f"{pattern} orders the tokens of a whole grid anew in each head; {use}"
    return None
