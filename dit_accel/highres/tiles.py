"""Predictions of a large picture in overlapping tiles of the native size, each with a text of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dit_accel.attention.branch_names import branch_name
from dit_accel.errors import UnavailableError
from dit_accel.generation import transformers

from .context import context_windows, ramp
from .stand_in import StandIn

_TEXT = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
_OF_A_SAMPLE = (
    "latents",
    "generator",
    "prompt_2",
    "prompt_3",
    "num_images_per_prompt",
    "num_videos_per_prompt",
)
Text = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tile:
    """Rows and columns of tokens, and the weights of both, float32."""

    rows: range
    columns: range
    weights: torch.Tensor

    def centre(self, grid: tuple[int, int]) -> tuple[float, float]:
        """(y, x) in fractions of the picture's sides."""
        axes = zip((self.rows, self.columns), grid, strict=True)
        return tuple((axis.start + axis.stop) / 2 / n for axis, n in axes)  # pyright: ignore[reportReturnType]


def tiles_of(grid: tuple[int, int], size: tuple[int, int]) -> list[Tile]:
    """Tiles of a size over a grid (rows, columns), half a tile apart, the last ones slid back.

    Weights are products of linear ramps, never 0, and 1 towards the picture's borders.
    """
    axes = []
    for n, side in zip(grid, size, strict=True):
        overlap = side // 2
        axes.append([(window, ramp(window, n, overlap)) for window in context_windows(n, side, overlap)])
    return [Tile(rows, columns, y[:, None] * x) for rows, y in axes[0] for columns, x in axes[1]]


class Screens(Protocol):
    """What is told which tile is predicted next, and which samples of the call are conditional."""

    def begin(self, tile: int, conditional: slice | None) -> None: ...

    def end(self) -> None: ...


class InTiles(StandIn):
    """Stands in for a transformer whose calls are made tile by tile, at the positions of the native size.

    Args:
        family, pipe: the transformer's.
        grid: rows and columns of tokens of a call.
        tiles: that cover it.
        texts: of each tile what takes the place of the conditional samples' text; None: nothing.
        screens: told of each tile; None: nothing is.
    """

    def __init__(
        self,
        transformer: Any,
        family: Any,
        pipe: Any,
        grid: tuple[int, int],
        tiles: Sequence[Tile],
        texts: Sequence[Text | None],
        screens: Screens | None = None,
    ):
        super().__init__(transformer)
        self._family, self._pipe, self._grid = family, pipe, grid
        self._tiles, self._texts, self._screens = tiles, texts, screens

    def predict(self, *, hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        if inputs["timestep"].ndim > 1:
            raise UnavailableError(
                'this model has a timestep for each token, which method "regional" cannot cut; use "swim"'
            )
        uncond = "uncond" in (branch_name() or "")
        every = {"hidden_states": hidden_states, **inputs}
        conditional = None if uncond else self._family.conditional(self._pipe, every)
        options = {"dtype": torch.float32, "device": hidden_states.device}
        total = torch.zeros(hidden_states.shape, **options)
        weight = torch.zeros([n * self._patch(hidden_states) for n in self._grid], **options)
        for index, (tile, text) in enumerate(zip(self._tiles, self._texts, strict=True)):
            own = inputs if text is None or conditional is None else _with_text(inputs, text, conditional)
            if self._screens is not None:
                self._screens.begin(index, None if text is not None else conditional)
            try:
                out = self._one(hidden_states, own, tile)
            finally:
                if self._screens is not None:
                    self._screens.end()
            self._add(total, weight, out, tile)
        if hidden_states.ndim == 3:
            return (total / weight.flatten()[:, None]).to(hidden_states.dtype)
        return (total / weight).to(hidden_states.dtype)

    def _patch(self, x: torch.Tensor) -> int:
        """Latents along the side of a token; 1 where tokens are packed."""
        return 1 if x.ndim == 3 else x.shape[-2] // self._grid[0]

    def _cut(self, x: torch.Tensor, tile: Tile) -> tuple[slice, slice]:
        patch = self._patch(x)
        rows, columns = (slice(a.start * patch, a.stop * patch) for a in (tile.rows, tile.columns))
        return rows, columns

    def _one(self, x: torch.Tensor, inputs: dict[str, Any], tile: Tile) -> torch.Tensor:
        rows, columns = self._cut(x, tile)
        if x.ndim > 3:
            return self.inner(hidden_states=x[..., rows, columns], **inputs)
        own = x.unflatten(1, self._grid)[:, rows, columns].flatten(1, 2)
        ids = inputs["img_ids"].unflatten(0, self._grid)
        ids = ids[: len(tile.rows), : len(tile.columns)].flatten(0, 1)  # as if it were the whole picture
        return self.inner(hidden_states=own, **{**inputs, "img_ids": ids})

    def _add(self, total: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, tile: Tile) -> None:
        patch = self._patch(total)
        own = tile.weights.to(out.device).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        rows, columns = self._cut(total, tile)
        weight[rows, columns] += own
        if out.ndim > 3:
            total[..., rows, columns] += out.float() * own
        else:
            view = total.unflatten(1, self._grid)
            view[:, rows, columns] += out.float().unflatten(1, tuple(own.shape)) * own[..., None]


def _with_text(inputs: dict[str, Any], text: Text, conditional: slice) -> dict[str, Any]:
    changed = dict(inputs)
    for name, value in text.items():
        changed[name] = inputs[name].clone()
        changed[name][conditional] = value.to(inputs[name])
    return changed


class _Stop(Exception):
    pass


def text_of(pipe: Any, family: Any, prompt: str, call: dict[str, Any]) -> Text:
    """What a pipeline gives its transformer for a prompt, one sample of each, by the names of its inputs.

    The pipeline is called and stopped at its first call of the transformer.

    Args:
        call: arguments of the pipeline's call, of which prompt and generators are replaced.
    """
    seen: dict[str, Any] = {}

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Stop

    def of_a_sample(name: str) -> bool:
        return name in _OF_A_SAMPLE or "embeds" in name or name.endswith("attention_mask")

    own = {name: value for name, value in call.items() if not of_a_sample(name)}
    own |= {"prompt": prompt, "generator": torch.Generator("cpu").manual_seed(0)}
    if isinstance(own.get("negative_prompt"), list):
        own["negative_prompt"] = own["negative_prompt"][0]
    hook = transformers(pipe)[0].register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    with hook, suppress(_Stop):
        pipe(**own)
    rows = family.conditional(pipe, seen)
    return {name: seen[name][rows][:1] for name in _TEXT if isinstance(seen.get(name), torch.Tensor)}


def boxes_within(tiles: Sequence[Tile], grid: tuple[int, int]) -> Iterator[tuple[float, float, float, float]]:
    """(top, left, bottom, right) of tiles in fractions of the picture's sides."""
    for tile in tiles:
        rows, columns = tile.rows, tile.columns
        yield rows.start / grid[0], columns.start / grid[1], rows.stop / grid[0], columns.stop / grid[1]


def tokens_within(box: tuple[float, float, float, float], grid: tuple[int, int]) -> torch.Tensor:
    """Which tokens of a grid a box touches, bool (rows x columns,)."""
    top, left, bottom, right = box
    inside = torch.zeros(grid, dtype=torch.bool, device="cpu")
    rows = slice(math.floor(top * grid[0] + 1e-6), math.ceil(bottom * grid[0] - 1e-6))
    inside[rows, math.floor(left * grid[1] + 1e-6) : math.ceil(right * grid[1] - 1e-6)] = True
    return inside.flatten()
