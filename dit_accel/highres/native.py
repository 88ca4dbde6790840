"""What a pipeline's model was trained for: its native size, and the sizes that it can be asked for."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.arguments import integer, integers
from dit_accel.errors import UnavailableError
from dit_accel.generation import is_video, size_multiple, transformers
from dit_accel.masks.layout import TokenLayout
from dit_accel.pipelines import tiny
from dit_accel.pipelines.families import family_of

if TYPE_CHECKING:
    from dit_accel.pipelines.families.base import Family


@dataclass(frozen=True)
class Size:
    """Of a picture or a video in pixels and frames, 1 of a picture."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames > 1 else "")


@dataclass(frozen=True)
class Native:
    """A pipeline's model as its training left it.

    Attributes:
        family: of its transformer.
        size: that it was trained for.
        pixels: of a token (rows, columns).
        frames: of a latent frame.
        video: whether it makes videos.
        bundled: whether it is one of the models that come with the library.
    """

    family: Family
    size: Size
    pixels: tuple[int, int]
    frames: int
    video: bool
    bundled: bool

    @classmethod
    def of(cls, pipe: Any, size: tuple[int | None, int, int] | None = None) -> Native:
        """That of a pipeline; `size` is (frames, height, width), None: as published.

        Frames of None are the pipeline's default.

        Raises:
            TypeError: a pipeline of no known family.
            UnavailableError: a model that is none of the published ones, without a `size`.
        """
        transformer = transformers(pipe)[0]
        family = family_of(transformer)
        video = is_video(pipe)
        name = _bundled_name(pipe)
        if size is None:
            size = tiny.INFO[name].native if name else _published(family, transformer.config)
        if size is None:
            raise UnavailableError(
                f"this {family.name} model is none of those whose native size is known; give it, such as "
                "native=(1024, 1024)"
            )
        frames, height, width = size
        if frames is None:
            frames = default_of(pipe, "num_frames") if video else 1
        latent_frames = getattr(pipe, "vae_scale_factor_temporal", 1) if video else 1
        own = Size(width, height, frames if video else 1)
        return cls(family, own, size_multiple(pipe), latent_frames, video, name is not None)

    def grid(self, size: Size) -> tuple[int, int, int]:
        """Tokens (frames, rows, columns) of a size."""
        frames = (size.frames - 1) // self.frames + 1
        return frames, size.height // self.pixels[0], size.width // self.pixels[1]

    def tokens(self, size: Size) -> int:
        """Visual tokens of a size."""
        return math.prod(self.grid(size))

    def of_aspect(self, size: Size) -> Size:
        """The size of the native area with the aspect of `size`, in whole tokens."""
        shrink = math.sqrt(size.width * size.height / (self.size.width * self.size.height))
        height, width = (
            max(1, round(side / shrink / pixels)) * pixels
            for side, pixels in zip((size.height, size.width), self.pixels, strict=True)
        )
        return Size(width, height, size.frames)

    def target(self, pipe: Any, width: Any, height: Any, frames: Any) -> Size:
        """The size that is asked for, checked; `frames` None: the native number.

        Raises:
            ValueError: a size that the pipeline would round or cannot make, or that is not above the native
                area.
        """
        sides = integer("width", width, 1), integer("height", height, 1)
        for name, side, pixels in zip(("width", "height"), sides, self.pixels[::-1], strict=True):
            if side % pixels:
                lower = max(pixels, side // pixels * pixels)
                raise ValueError(
                    f"`{name}` must be a multiple of {pixels} for this model, got {side}; try {lower} or "
                    f"{side // pixels * pixels + pixels}"
                )
        if frames is not None and not self.video:
            raise ValueError(f"`num_frames` is for video models, and {type(pipe).__name__} makes images")
        frames = self.size.frames if frames is None else integer("num_frames", frames, 1)
        if (frames - 1) % self.frames:
            lower = (frames - 1) // self.frames * self.frames + 1
            raise ValueError(
                f"`num_frames` must be a multiple of {self.frames} plus 1 for this model, got {frames}; try "
                f"{lower} or {lower + self.frames}"
            )
        size = Size(*sides, frames)
        TokenLayout(self.grid(size))  # refuses too many
        most = getattr(transformers(pipe)[0].config, "pos_embed_max_size", None)
        if most is not None and max(self.grid(size)[1:]) > most:
            raise ValueError(
                f"this model has places for {most} rows and columns of tokens, at most "
                f"{most * self.pixels[1]}x{most * self.pixels[0]} pixels, got {size}"
            )
        return size


def check_supported(family: Family) -> None:
    """Raise UnavailableError where no run above native size can be made of a family's models."""
    if family.highres_refusal is not None:
        raise UnavailableError(
            f"runs above native size are not there for the family {family.name!r}: {family.highres_refusal}; "
            "call the pipeline itself at that size, with a recipe of the family"
        )


def native_size(value: Any) -> tuple[int | None, int, int] | None:
    """(frames, height, width) of an argument `native`, which is (height, width) or with frames in front."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)) and len(value) == 3:
        frames, height, width = integers("native", value, "(frames, height, width)", 1)
        return frames, height, width
    height, width = integers("native", value, "(height, width)", 1)
    return None, height, width


def _bundled_name(pipe: Any) -> str | None:
    folder = Path(str(getattr(pipe.config, "_name_or_path", "")))
    return next((name for name in tiny.NAMES if folder == tiny.weights_dir(name)), None)


def _published(family: Family, config: Any) -> tuple[int, int, int] | None:
    """The size of the published model of this configuration."""
    for model in family.published():
        same = (
            _plain(getattr(config, name, None)) == _plain(value) for name, value in model["config"].items()
        )
        if all(same):
            return tuple(model["size"])
    return None


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def default_of(pipe: Any, name: str) -> Any:
    """The default of an argument of a pipeline's call."""
    return inspect.signature(pipe.__call__).parameters[name].default
