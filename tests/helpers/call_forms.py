"""Forms in which a transformer may be called: guidance in one batch or in two calls, batches, other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from mask_oracle import Oracle, recorded
from torch.nn import functional as F

from dit_accel.patterns import Dense
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe


class Model:
    """A tiny random pipeline, its oracle, and the forms in which its transformer may be called.

    Args:
        tools: how to make and run it, of the fixture `families`.
        config: of its transformer.
        sizes: two grids of tokens.
        masked: the fixture.
    """

    def __init__(self, tools: SimpleNamespace, config: dict, sizes: Sequence[tuple[int, ...]], masked):
        self.pipe, self.sizes, self.run_grid = tools.make(**config), sizes, tools.run
        generator = torch.Generator().manual_seed(3)
        for layer in family_of(self.pipe.transformer).layers(self.pipe.transformer).values():
            norms = ("norm_q", "norm_k", "query_norm", "key_norm")
            for norm in filter(None, (getattr(layer, name, None) for name in norms)):
                # so that heads choose differently
                norm.weight.data.normal_(std=2, generator=generator)
        self.oracle = Oracle(self.pipe.transformer, masked)
        guided = recorded(self.pipe, Recipe(Dense()), lambda pipe: self.run(pipe, cfg=3.0))
        self.branches = [call.inputs for call in guided]  # of guidance, or both in one

    def run(self, pipe, size: int = 0, **run) -> None:
        self.run_grid(pipe, grid=self.sizes[size], text_len=7 + 2 * size, steps=1, **run)

    def cfg_in_one_batch(self, pipe) -> None:
        if len(self.branches) == 1:
            self.run(pipe, cfg=3.0)
        else:
            pipe.transformer(**joined(*self.branches, self.oracle.family.shared_inputs))

    def cfg_in_two_calls(self, pipe) -> None:
        if len(self.branches) == 2:
            self.run(pipe, cfg=3.0)
        else:
            for half in halves(*self.branches):
                pipe.transformer(**half)

    def batch(self, pipe) -> None:
        self.run(pipe, batch=2)

    def changed_size(self, pipe) -> None:
        for size in (0, 1, 0):
            self.run(pipe, size)


def joined(a: dict, b: dict, shared: Sequence[str]) -> dict:
    """The inputs of two calls in one batch; text of different lengths, which has a mask, is padded.

    Those that samples share stay as they are.
    """

    def join(name: str):
        if not isinstance(a[name], torch.Tensor) or name in shared or name.endswith("_pos"):
            return a[name]
        parts = [a[name], b[name]]
        if name in ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask"):
            longest = max(part.shape[1] for part in parts)
            parts = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in parts]
        return torch.cat(parts)

    return {name: join(name) for name in a}


def halves(inputs: dict) -> list[dict]:
    """The inputs of a call of two samples as those of two calls."""
    return [
        {
            name: x.chunk(2)[i] if isinstance(x, torch.Tensor) else x[i : i + 1] if isinstance(x, list) else x
            for name, x in inputs.items()
        }
        for i in range(2)
    ]
