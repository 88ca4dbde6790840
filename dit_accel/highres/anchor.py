"""Scale-DiT: windows of the large picture that also see the whole small one, which stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dit_accel import latents
from dit_accel.arguments import integer, integers
from dit_accel.errors import UnavailableError
from dit_accel.patterns import LocalGlobal, Pattern

from .method import Before, Job, Method, Windowed
from .native import Native, Size
from .stand_in import StandIn, standing_in

_ANCHOR = 1  # the first of an anchor's ids, by which layouts tell it from the picture


@dataclass(frozen=True)
class Anchor(Windowed):
    """The native result as an anchor in the sequence; for FLUX, whose calls may hold a second picture.

    Tokens are [text, picture, anchor]. The picture attends to its windows, to text and to the whole anchor,
    the anchor to text and itself, text to everything. At every step the anchor is the native result with
    noise of the step's level, and its positions are those of the large picture: (y, x) times their sizes'
    ratio. Scale-DiT links both by a LoRA, trained so; one that is loaded on the pipeline stays on, and
    without it the anchor is a hint that the model was not trained for.

    Args:
        window: (rows, columns) of tokens; published (16, 16), a quarter of the native side. By its name the
            method takes the native size.
        sliding: whether every token has a window of its own, as published for inference, or they lie side by
            side, moved by a token, as in training.
        seed: of the anchor's noise.

    Source: Zhang and Tai, "Scale-DiT: Ultra-High-Resolution Image Generation with Hierarchical Local
    Attention", 2025, and its released code.
    """

    window: tuple[int, int]
    sliding: bool = True
    seed: int = 0

    name: ClassVar[str] = "anchor"

    def __post_init__(self):
        object.__setattr__(self, "window", integers("window", self.window, "(rows, columns)", 1))
        integer("seed", self.seed, 0)
        self.pattern()  # which checks

    @classmethod
    def suited(cls, native: Native, base: Size) -> Method:
        return cls(native.grid(base)[1:])

    def pattern(self) -> Pattern:
        return LocalGlobal(self.window, sliding=self.sliding)

    def check(self, pipe: Any, job: Job) -> None:
        if job.native.family.name != "flux":
            raise UnavailableError(
                'method "anchor" puts a second picture into the sequence, for which '
                f'{job.native.family.name} has no place; use "swim" or "compressed"'
            )

    @contextmanager
    def around(self, pipe: Any, before: Before, job: Job, call: dict[str, Any]) -> Iterator[None]:
        base = job.base
        small = latents.resized(before.frames, base.height, base.width)
        reference = latents.packed(latents.encoded(pipe, small, video=False))
        generator = torch.Generator("cpu").manual_seed(self.seed)
        noise = torch.randn(reference.shape, generator=generator, device="cpu").to(reference)
        grid, large = job.native.grid(base), job.native.grid(job.target)
        ratio = [b / a for a, b in zip(grid[1:], large[1:], strict=True)]
        with (
            pipe.transformer.pos_embed.register_forward_pre_hook(_spread(ratio)),
            standing_in(pipe, lambda transformer: _WithAnchor(transformer, reference, noise, grid)),
        ):
            yield


def _spread(ratio: list[float]) -> Any:
    """A hook of the rotary embedding by which an anchor's ids (S, 3) are those of the picture's frame."""

    def moved(module: Any, args: tuple) -> tuple:
        ids = args[0].float()
        factors = torch.tensor([0.0, *ratio], device=ids.device)
        return (torch.where(ids[:, :1] == _ANCHOR, ids * factors, ids), *args[1:])

    return moved


class _WithAnchor(StandIn):
    """FLUX with the re-noised anchor behind the picture of every call."""

    def __init__(
        self, transformer: Any, reference: torch.Tensor, noise: torch.Tensor, grid: tuple[int, int, int]
    ):
        super().__init__(transformer)
        self._reference, self._noise = reference, noise
        places = (torch.arange(n, device="cpu") for n in grid[1:])
        self._ids = torch.cartesian_prod(torch.tensor([_ANCHOR], device="cpu"), *places)

    def predict(
        self, *, hidden_states: torch.Tensor, timestep: torch.Tensor, img_ids: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        level = timestep.float()[:, None, None]
        times = len(hidden_states) // len(self._reference)
        reference, noise = (x.repeat(times, 1, 1) for x in (self._reference, self._noise))
        anchor = (level * noise + (1 - level) * reference).to(hidden_states)
        out = self.inner(
            hidden_states=torch.cat([hidden_states, anchor], dim=1),
            timestep=timestep,
            img_ids=torch.cat([img_ids, self._ids.to(img_ids)]),
            **inputs,
        )
        return out[:, : hidden_states.shape[1]]
