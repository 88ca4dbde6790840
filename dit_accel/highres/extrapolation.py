"""A transformer's rotary embedding extended to more rows and columns than it was trained for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_accel.arguments import positive, shown
from dit_accel.errors import UnavailableError
from dit_accel.pipelines.families import family_of

from .native import check_supported
from .rotary_tables import METHODS, frequencies_of

_THETA = 10000.0


@dataclass(frozen=True)
class Rotary:
    """How the positions of rows and columns go on beyond those of training; those of frames never do.

    Args:
        method: `"ntk"`, `"yarn"` or `"dype"`, see `dit_accel.highres.rotary`; each axis by its own length.
        factor: of `"ntk"`, on theta, whatever the length; CLEAR and I-Max use 10; None: by the length.
        clip: whether no frequency falls below that of interpolation, f / sqrt(tokens / trained tokens), as in
            I-Max.

    Raises:
        ValueError: an unknown method, or options that it does not have.
    """

    method: str
    factor: float | None = None
    clip: bool = False

    def __post_init__(self):
        if self.method not in METHODS[1:]:
            raise ValueError(f"`rotary` must be one of {', '.join(METHODS[1:])}, got {shown(self.method)}")
        if self.factor is not None:
            object.__setattr__(self, "factor", positive("factor", self.factor))
        if (self.factor is not None or self.clip) and self.method != "ntk":
            raise ValueError(f'`factor` and `clip` are options of method "ntk", got method {self.method!r}')

    @contextmanager
    def applied(self, transformer: nn.Module, trained: tuple[int, int]) -> Iterator[None]:
        """On in a transformer for the length of a `with` block.

        Args:
            trained: rows and columns of tokens in training.

        Raises:
            UnavailableError: a family without rotary embedding, or without runs above native size.
        """
        family = family_of(transformer)
        check_supported(family)
        module = family.rotary_module(transformer)
        if module is None:
            raise UnavailableError(
                f"{family.name} has no rotary embedding but a table of places; use rotary=None"
            )
        level, theta = [1.0], float(getattr(module, "theta", _THETA))

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            level[0] = min(1.0, float(kwargs["timestep"].max()) / (family.pure_noise or 1.0))

        def replaced(module: nn.Module, args: tuple, output: tuple) -> tuple:
            axes = family.rotary_axes(transformer, args)
            tables = self._tables(axes, trained, level[0], theta)
            return tuple(new.to(old).reshape(old.shape) for new, old in zip(tables, output, strict=True))

        with ExitStack() as stack:
            if self.method == "dype":
                stack.enter_context(transformer.register_forward_pre_hook(note, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(replaced, prepend=True))
            yield

    def _tables(
        self, axes: list[tuple[torch.Tensor, int]], trained: tuple[int, int], level: float, theta: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (S, all dimensions), in fp64.

        Args:
            axes: positions and dimension of frames (or FLUX's index), rows and columns.
        """
        now = math.prod(float(positions.max()) + 1 for positions, _ in axes[1:])
        shrink = max(1.0, math.sqrt(now / math.prod(trained)))
        found = []
        for (positions, dim), length in zip(axes, (None, *trained), strict=True):
            plain = frequencies_of(dim, positions, "none", theta=theta)[0]
            if length is None:
                frequencies, factor = plain, 1.0
            elif self.factor is not None:
                frequencies, factor = frequencies_of(dim, positions, "none", theta=theta * self.factor)
            else:
                options = {"original": length, "timestep": level, "theta": theta}
                frequencies, factor = frequencies_of(dim, positions, self.method, **options)
            if self.clip and length is not None:
                frequencies = torch.maximum(frequencies, plain / shrink)
            angles = positions.double()[:, None] * frequencies.to(positions.device)
            found.append([(f(angles) * factor).repeat_interleave(2, 1) for f in (torch.cos, torch.sin)])
        cos, sin = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
        return cos, sin
