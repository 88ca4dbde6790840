"""C-Upscale: regions of native size, each with words of its own, held together by the native result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dit_accel.arguments import integer, is_number, shown
from dit_accel.attention.branch_names import BranchNames
from dit_accel.errors import UnavailableError
from dit_accel.generation import transformers
from dit_accel.guidance.branch import stateful_caches

from . import screening
from .low_pass import haar
from .method import Before, Job, Method, Pass, Work
from .native import Native, Size
from .schedule import OnStep, Part
from .stand_in import standing_in
from .tiles import InTiles, boxes_within, text_of, tiles_of, tokens_within

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Regional(Method):
    """Every step is predicted in overlapping tiles of the native size; three priors keep one scene.

    Structure: with x0 = x - t v and ref the enlarged native result, x0 + c (low(ref) - low(x0)) takes the
    place of x0, `low` a Haar approximation and c = structure (1 + cos(pi i / N)) / 2 at step i of N. Regional
    prompts: a tile whose centre is in a box reads its text, others the prompt. Screening: of the prompt, a
    tile's visual queries do not see text tokens to which its place in the native pass gave less than
    `screening` of what they get in the whole picture, as the mean over layers, heads and steps. Filter,
    schedule and threshold are this project's, as the paper gives none. For joint attention; with Wan's
    cross-attention without screening.

    Args:
        prompts: of boxes (top, left, bottom, right) in fractions of the sides and their texts, the last that
            holds a tile's centre counts: `{(0, 0, 1, 0.5): "a red fox"}` or such pairs.
        structure: from 0, nothing, to 1.
        level: of the Haar approximation, from 1.
        screening: threshold from 0 to 1; None: none.

    Raises:
        ValueError: values outside of these forms.

    Source: after C-Upscale, arXiv 2505.16976, 2025.
    """

    prompts: Any = ()
    structure: float = 1.0
    level: int = 1
    screening: float | None = 0.5

    name: ClassVar[str] = "regional"
    enlarging: ClassVar[str] = "bicubic"

    def __post_init__(self):
        pairs = self.prompts.items() if isinstance(self.prompts, dict) else self.prompts
        object.__setattr__(self, "prompts", tuple((tuple(box), text) for box, text in pairs))
        for box, text in self.prompts:
            good = len(box) == 4 and all(is_number(x) and 0 <= x <= 1 for x in box)
            if not good or box[0] >= box[2] or box[1] >= box[3] or not isinstance(text, str):
                raise ValueError(
                    "`prompts` must be of boxes (top, left, bottom, right) with 0 <= top < bottom <= 1, the "
                    f"same from left to right, and texts, got {shown((box, text))}"
                )
        object.__setattr__(self, "level", integer("level", self.level, 1))
        for name in ("structure", "screening"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or not 0 <= value <= 1):
                raise ValueError(f"`{name}` must be from 0 to 1, got {shown(value)}")

    @classmethod
    def suited(cls, native: Native, base: Size) -> Method:
        return cls(screening=0.5 if _joint(native) else None)

    @property
    def watches(self) -> bool:
        return self.screening is not None

    def check(self, pipe: Any, job: Job) -> None:
        if self.screening is not None and not _joint(job.native):
            raise UnavailableError(
                f"{job.native.family.name} reads text by cross-attention, and screening is for joint "
                "attention; use screening=None"
            )
        for transformer in transformers(pipe):
            caches = stateful_caches(transformer)
            if caches:
                raise UnavailableError(
                    f'method "regional" calls the transformer tile by tile, which {caches[0]} would take for '
                    "steps of one picture; call `transformer.disable_cache()`"
                )

    def work(self, job: Job, one: Pass) -> Work:
        count = len(tiles_of(*(job.native.grid(size)[1:] for size in (one.size, job.base))))
        ((pattern, *_),) = super().work(job, one).calls
        return Work(((pattern, count, count),), size=replace(job.base, frames=one.size.frames))

    def watching(self, pipe: Any, watched: list[torch.Tensor]) -> AbstractContextManager[Any]:
        return ExitStack() if self.screening is None else self._noting(pipe, watched)

    @contextmanager
    def _noting(self, pipe: Any, watched: list[torch.Tensor]) -> Iterator[None]:
        with _listening(pipe), screening.noting(pipe, watched):
            yield

    @contextmanager
    def around(self, pipe: Any, before: Before, job: Job, call: dict[str, Any]) -> Iterator[None]:
        native, family = job.native, job.native.family
        grid, base = native.grid(job.target)[1:], native.grid(job.base)[1:]
        tiles = tiles_of(grid, base)
        read = {prompt: text_of(pipe, family, prompt, call) for prompt in dict(self.prompts).values()}
        texts = [read.get(self._prompt_at(*tile.centre(grid)) or "") for tile in tiles]
        screen = None
        with ExitStack() as stack:
            stack.enter_context(_listening(pipe))
            if self.screening is not None:
                received = before.watched[0][-len(before.frames) :]  # SD3's unconditional samples are first
                within = [tokens_within(box, base) for box in boxes_within(tiles, grid)]
                screen = screening.Screen(screening.screened(received, within, self.screening))
                stack.enter_context(screening.screening(pipe, screen))
            make = lambda part: InTiles(part, family, pipe, grid, tiles, texts, screen)  # noqa: E731
            stack.enter_context(standing_in(pipe, make))
            yield

    def _prompt_at(self, y: float, x: float) -> str | None:
        """The text of the last box that holds a place."""
        found = None
        for (top, left, bottom, right), text in self.prompts:
            found = text if top <= y <= bottom and left <= x <= right else found
        return found

    def on_step(self, before: Before, part: Part) -> OnStep | None:
        if not self.structure:
            return None
        reference = before.reference

        def held(v: torch.Tensor, x: torch.Tensor, level: float, step: int, steps: int) -> torch.Tensor:
            c = self.structure * (1 + math.cos(math.pi * step / steps)) / 2
            clean = x - level * v
            clean = clean + c * (haar(reference, self.level) - haar(clean, self.level))
            return (x - clean) / (level + 1e-6)

        return held


def _joint(native: Native) -> bool:
    """Whether text and visual tokens share a softmax."""
    return native.family.planned_layout((1, 1, 1), 1).text_len > 0


@contextmanager
def _listening(pipe: Any) -> Iterator[None]:
    """Calls of the transformers tell which guidance branch they are of, as listened to by others or here."""
    own = [BranchNames(part) for part in transformers(pipe) if "cache_context" not in vars(part)]
    for names in own:
        names.attach()
    try:
        yield
    finally:
        for names in own:
            names.detach()
