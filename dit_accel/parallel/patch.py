"""Patch parallelism: each process has a band of a picture's rows, and exchanges what local patterns reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.attention.banded import BandedAttention, Bands
from dit_accel.attention.call import LayerAttention
from dit_accel.attention.layer_masks import LayerMasks
from dit_accel.attention.shards import exchange
from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern, StaticPattern
from dit_accel.recipe.recipe import Recipe, resolve
from dit_accel.runtime.binding import Binding
from dit_accel.runtime.switching import Handle, accelerated, handle_of

TEXTS = ("exact", "averaged")


@contextmanager
def patch_parallel(
    target: Any, recipe: Recipe | Pattern | str | Path, *, text: str = "exact", group: Any = None
) -> Iterator[Handle]:
    """Share every picture among processes by bands of rows, for the length of a `with` block.

    A process computes the tokens of its rows and all text tokens. In a layer it sends the keys and values of
    the rows that its neighbours' queries reach, which are as many however many processes there are; that is
    what `context_parallel` cannot say. All processes make the same calls with the same inputs, and all get
    the whole output. `handle.stats()["sent_bytes"]` counts what attention sent.

    Args:
        target: a pipeline or transformer of FLUX or FLUX.2.
        recipe: all of whose layers follow `Clear`, `InwardWindow` or `Neighborhood` (without strides,
            dilation and causality), in every step.
        text: `"exact"`: text queries attend to the whole picture, in parts that are joined; the output is
            that of one process, to rounding. `"averaged"`: they take the mean of what they read in each
            band, as CLEAR has it: another result, and a little less to send.
        group: of processes, from `torch.distributed.new_group`; None: all.

    Raises:
        UnavailableError: a family whose rows cannot be told apart outside, a recipe that needs more than the
            neighbouring rows, or no `torch.distributed`.
        ValueError: another `text`; in a call, bands of fewer rows than a pattern needs.
    """
    if text not in TEXTS:
        raise ValueError(f"`text` must be 'exact' or 'averaged', got {text!r}")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise UnavailableError(
            "`patch_parallel` needs several processes: start them with `torchrun` or `accelerate launch`, "
            "and call `torch.distributed.init_process_group` first"
        )
    recipe = resolve(recipe)
    if (reason := unbanded(recipe)) is not None:
        raise UnavailableError(f"`patch_parallel`: {reason}")
    rank, count = (f(group) for f in (torch.distributed.get_rank, torch.distributed.get_world_size))
    reach = max(pattern.row_reach or 0 for pattern in recipe.patterns)
    patch = max(max(pattern.pools for pattern in recipe.patterns), 1)
    least = max(pattern.band_rows for pattern in recipe.patterns)
    bands = Bands(rank, count, reach, least, text == "averaged", patch, group)
    with accelerated(target, _banded(recipe, bands)) as handle:
        hooks: list[Any] = []
        try:
            for binding in handle.bindings.values():
                hooks += _Cropped(binding, bands, handle).attach()
            yield handle
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Banded(Pattern):
    """A local pattern in a process that has a band of the rows.

    Args:
        inner: the pattern.
        rank, count: which band of how many.
        bands: the same, with all that is no part of a recipe's text.
    """

    inner: StaticPattern
    rank: int
    count: int
    bands: InitVar[Bands]

    def __post_init__(self, bands: Bands):
        object.__setattr__(self, "_bands", bands)

    def density(self, layout: TokenLayout) -> float:
        """Of the band alone, as if it were the picture."""
        return self.inner.density(layout)

    def token_order(self, layout: TokenLayout, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner.token_order(layout, *args, **kwargs)

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        return BandedAttention.of(self._bands, [pattern.inner for pattern in heads], masks)


def unbanded(recipe: Recipe) -> str | None:
    """Why a recipe needs more than neighbouring rows of keys and values, with the remedy, or None."""
    for pattern in recipe.patterns:
        if pattern.row_reach is None:
            return (
                f"{pattern} is not bounded in the rows that it reaches; use Clear, InwardWindow or a plain "
                "Neighborhood, or `context_parallel`"
            )
    if len({pattern.pools for pattern in recipe.patterns}) > 1:
        return "all its patterns must pool the same patches of keys, or none; use one `downsample`"
    whole = {"dense_layers": 0, "dense_steps": 0, "quantization": None, "tail": None, "min_tokens": 0}
    whole |= {"guidance": None}
    for name, none in whole.items():
        value = getattr(recipe, name)
        if value not in (none, (), frozenset()):
            return (
                f"`{name}={value!r}` needs what all tokens have, and a process has its own and neighbouring "
                f"rows; use {name}={none!r}, or `context_parallel`"
            )
    return None


def _banded(recipe: Recipe, bands: Bands) -> Recipe:
    def banded(pattern: Pattern) -> Banded:
        return Banded(pattern, bands.rank, bands.count, bands)

    attention = recipe.attention
    if isinstance(attention, dict):
        return replace(recipe, attention={key: banded(one) for key, one in attention.items()})
    return replace(recipe, attention=banded(attention))


class _Cropped:
    """Gives one transformer's calls the rows of a band, and joins what they return.

    Args:
        binding: of the transformer, that of `handle`.
        bands: of this process.
    """

    def __init__(self, binding: Binding, bands: Bands, handle: Handle):
        self.binding, self.bands, self.handle = binding, bands, handle
        self._height, self._memo = 0, {}
        family, name = binding.family, type(binding.transformer).__name__
        if family.band_dim is None:
            raise UnavailableError(
                f"{name} ({family.name}) places its tokens inside, where bands of rows cannot be told apart; "
                "`patch_parallel` is for FLUX and FLUX.2: use `context_parallel`"
            )
        if binding.shards is not None:
            raise UnavailableError(
                f"this {name} is shared by `context_parallel` already; use one of the two on a transformer"
            )
        dense = next((layer for layer in binding.layers if not layer.heads), None)
        if dense is not None:
            raise UnavailableError(
                f"layer {dense.name} is dense ({dense.reason}), and attends to rows of other processes; give "
                "all layers a local pattern, or use `context_parallel`"
            )

    def attach(self) -> list[Any]:
        transformer = self.binding.transformer
        return [
            transformer.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            transformer.register_forward_hook(self._after),
        ]

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if handle_of(module) is not self.handle:
            raise UnavailableError(
                "another recipe was enabled, or this one disabled, inside of `patch_parallel`; end its "
                "`with` block first"
            )
        family = self.binding.family
        inputs = {**dict(zip(self.binding.inputs, args, strict=False)), **kwargs}
        reason = family.not_parallel(module, inputs)
        if reason is not None:
            raise UnavailableError(f"patch parallelism is not supported here: {reason}")
        layout = family.layout(module, inputs, self._memo)
        self._height = layout.grid[1]
        self.bands.picture["height"] = self._height
        self.bands.check(self.bands.sizes(self._height))
        return (), family.band(inputs, layout, self.bands.rows(self._height))

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        sample = output[0] if isinstance(output, tuple) else output.sample
        joined = self._joined(sample, self.binding.family.band_dim)
        return (joined, *output[1:]) if isinstance(output, tuple) else type(output)(sample=joined)

    def _joined(self, sample: torch.Tensor, dim: int) -> torch.Tensor:
        """The bands of all processes, one after the other."""
        bands = self.bands
        per_row = sample.shape[dim] // len(bands.rows(self._height))
        shapes = []
        for rows in bands.sizes(self._height):
            shape = list(sample.shape)
            shape[dim] = per_row * rows
            shapes.append(torch.Size(shape))
        sent = [sample.contiguous().flatten()] * bands.count
        parts = exchange(sent, [shape.numel() for shape in shapes], bands.group)
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim)
