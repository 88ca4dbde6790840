"""What a demo is started with: models, where they run, and the caps on what a visitor may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.pipelines import tiny

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parents[1] / "evals" / "results"


@dataclass(frozen=True)
class Caps:
    """The most that one run may ask for."""

    side: int = 1280  # pixels
    pixels: int = 2**27  # of all frames together: 145 of 1280 x 720
    frames: int = 145
    steps: int = 100
    prompt: int = 2_000  # characters
    recipe: int = 20_000  # characters
    tokens: int = 2**17  # of a mask: 129 frames of 720p
    waiting: int = 16  # runs and look-ups in the queue, all visitors together
    kept: int = 6  # results in a visitor's folder; older ones are deleted
    visitors: int = 256  # of which Gradio remembers what their page looks like, 0.25 MB each
    idle: int = 3600  # seconds until a visitor who left without a word is forgotten
    body: int = 2**20  # bytes of one message to the server


@dataclass(frozen=True)
class Settings:
    """See the module docstring. `models` are bundled names, and what the owner gave with `--model`."""

    device: torch.device
    dtype: torch.dtype
    models: tuple[str, ...] = tiny.NAMES
    results: Path = RESULTS
    caps: Caps = field(default_factory=Caps)

    @property
    def dtype_name(self) -> str:
        """As `--dtype` takes it."""
        return str(self.dtype).removeprefix("torch.")
