"""What a distillation may be told, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dit_accel.arguments import integer, is_number, shown, switch
from dit_accel.seeds import check_seed

OPTIMIZERS = ("adamw", "prodigy")
LEVELS = ("scheduler", "uniform")
PRECISIONS = ("auto", "bf16", "fp32")
_RATES = {"adamw": 1e-4, "prodigy": 1.0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `dit_accel.distill`.

    Args:
        steps: of training.
        batch: samples of a step, of all processes together.
        at_once: samples of one forward pass, the largest part of a batch that fits into memory.
        rank: of the LoRA; None: whole weights are trained.
        optimizer: `"adamw"`, or `"prodigy"` (Mishchenko & Defazio, 2023), which finds its rate; it needs
            `prodigyopt`.
        rate: of the optimizer; None: 1e-4, and 1 for Prodigy.
        weight_decay: decoupled, of either.
        warmup: steps over which the rate rises; None: 50 at most, and none for Prodigy.
        decay: share of the steps at the end over which it falls to a tenth; None: 0.5, and 0 for Prodigy.
        average: of the exponential average of the weights, which are what is kept; 0: the last ones are.
        flow, prediction, attention: weights of the parts of the loss: the flow's own, the distance to the
            prediction of the untouched model, and to its attention outputs in `taps`.
        taps: layers whose attention outputs are compared; None: of those that the recipe changes, the
            single-stream ones where there are any, each whose flat index is a multiple of 4, and else the
            last.
        train: names of the projections of an attention layer that are trained; None: those of the layer's
            pattern.
        levels: how noise levels are drawn: evenly and then moved as the `"scheduler"` does, or `"uniform"`.
        empty: share of samples with the empty prompt in the place of their own, for classifier-free guidance.
        precision: `"bf16"`: mixed precision, weights that are trained in fp32; `"fp32"`; or `"auto"`: the
            first where the device multiplies bf16 (`dit_accel.training_loop.multiplies_bf16`), else the
            other. A run that is resumed keeps what it began with.
        checkpointing: whether blocks are computed again in the backward pass, which saves memory.
        samples: how many are generated; None: one for each prompt.
        held_out: samples that are not trained on, on which the result is measured; None: a sixteenth, 8 at
            most.
        seed: of all draws.
        save_every: steps between checkpoints.

    Raises:
        ValueError, TypeError: a value outside these forms.
    """

    steps: int = 1000
    batch: int = 4
    at_once: int = 1
    rank: int | None = 16
    optimizer: str = "adamw"
    rate: float | None = None
    weight_decay: float = 1e-4
    warmup: int | None = None
    decay: float | None = None
    average: float = 0.99
    flow: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5
    taps: Sequence[str] | None = None
    train: Sequence[str] | None = None
    levels: str = "scheduler"
    empty: float = 0.1
    precision: str = "auto"
    checkpointing: bool = False
    samples: int | None = None
    held_out: int | None = None
    seed: int = 0
    save_every: int = 100

    def __post_init__(self):
        for name in ("steps", "batch", "at_once", "rank", "samples", "save_every"):
            if getattr(self, name) is not None or name in ("steps", "batch", "at_once", "save_every"):
                integer(name, getattr(self, name), 1)
        for name in ("warmup", "held_out"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 0)
        for name in ("rate", "weight_decay", "flow", "prediction", "attention"):
            value: Any = getattr(self, name)
            if not (value is None and name == "rate") and not (is_number(value) and value >= 0):
                raise ValueError(f"`{name}` must be a number from 0 up, got {shown(value)}")
        if not self.flow + self.prediction + self.attention:
            raise ValueError("one of `flow`, `prediction` and `attention` must be above 0")
        for name in ("average", "empty"):
            value: Any = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"`{name}` must be a share from 0 to below 1, got {shown(value)}")
        if self.decay is not None and not (is_number(self.decay) and 0 <= self.decay <= 1):
            raise ValueError(f"`decay` must be a share from 0 to 1, got {shown(self.decay)}")
        for name, known in (("optimizer", OPTIMIZERS), ("levels", LEVELS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                names = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
                raise ValueError(f"`{name}` must be {names}, got {shown(getattr(self, name))}")
        for name in ("taps", "train"):
            value = getattr(self, name)
            if value is not None:
                if isinstance(value, str) or not value or not all(isinstance(one, str) for one in value):
                    raise TypeError(f"`{name}` must be a sequence of names or None, got {shown(value)}")
                object.__setattr__(self, name, tuple(value))
        switch("checkpointing", self.checkpointing)
        check_seed(self.seed)

    @property
    def learning_rate(self) -> float:
        """The rate, or that of its optimizer."""
        return _RATES[self.optimizer] if self.rate is None else self.rate

    @property
    def schedule(self) -> tuple[int, float]:
        """Steps of warm-up, and share of the decay."""
        usual = (min(50, self.steps), 0.5) if self.optimizer == "adamw" else (1, 0.0)
        warmup = usual[0] if self.warmup is None else max(1, self.warmup)
        return warmup, usual[1] if self.decay is None else self.decay

    def held_out_of(self, samples: int) -> int:
        """How many of so many samples are held out.

        Raises:
            ValueError: none would be left.
        """
        count = min(8, samples // 16) if self.held_out is None else self.held_out
        if count >= samples:
            raise ValueError(
                f"`held_out` is {count}, and there are {samples} samples: none is left to train on"
            )
        return count

    def about(self) -> dict[str, Any]:
        """All that decides what comes out, as plain data."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "save_every"}
