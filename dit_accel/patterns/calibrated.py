"""What a calibration says for each layer and head, at each step (PARO, and mixtures of patterns)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dit_accel.arguments import shown, switch
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import Rule

from .base import Pattern, StaticPattern
from .calibration import Calibration
from .head_choice import HeadChoice

if TYPE_CHECKING:
    from dit_accel.attention.call import LayerAttention
    from dit_accel.attention.layer_masks import LayerMasks


@dataclass(frozen=True)
class Calibrated(Pattern):
    """Each head computes what a calibration chose for it, in a token order of its own.

    PARO's blocks in one of six orders of the axes, or any static pattern of the toolkit, with the tail or
    without, at every stretch of a run; see `dit_accel.calibrate`, which makes the calibration. Text is always
    attended. In `dit_accel.attention`, which knows no layers, `layer` says whose heads they are.

    Args:
        calibration: a `Calibration` or the path of its file.
        rescale: whether runs of another number of steps, and other grids, are taken: steps by their share of
            the run, and blocks by where their tokens are in the grid.
        layer: the layer whose heads all layers take; None: each its own.

    Raises:
        ValueError: a file that is no calibration or is damaged, or a layer that it does not have; and when
            applied, another model, grid or number of steps than it was made for, unless rescaled.

    Source: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized
    Attention", 2025. The choice among patterns by output error is this library's own.
    """

    calibration: Calibration
    rescale: bool = False
    layer: str | None = None
    file_fields = ("calibration",)

    def __post_init__(self):
        if isinstance(self.calibration, (str, Path)):
            object.__setattr__(self, "calibration", Calibration.load(self.calibration))
        if not isinstance(self.calibration, Calibration):
            raise ValueError(
                f"`calibration` must be a Calibration or the path of its file, got {shown(self.calibration)}"
            )
        switch("rescale", self.rescale)
        if self.layer is not None:
            self.calibration.layer_index(self.layer)

    @property
    def notes(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        counts = ", ".join(f"{n} {kind}" for kind, n in self.calibration.counts().items())
        rows = f" in each of {self.calibration.rows} stretches" if self.calibration.rows > 1 else ""
        return [f"calibrated at density {self.calibration.density:g}, heads{rows}, all together: {counts}"]

    @property
    def own_tail(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.calibration.tail.any())

    def check_model(self, family: str, layers: Sequence[str], heads: int, head_dim: int) -> None:
        names = self.calibration.layers if self.layer is not None else layers
        self.calibration.check_model(family, names, heads, head_dim)

    def for_head(self, layer: str | None, head: int) -> Pattern:
        name = layer if self.layer is None else self.layer
        if name is None:
            raise ValueError(
                "Calibrated says something else for each layer; name it, as in "
                f"Calibrated(calibration, layer={self.calibration.layers[0]!r})"
            )
        if not 0 <= head < self.calibration.heads:
            raise ValueError(f"the calibration is for {self.calibration.heads} heads, got head {head}")
        return CalibratedHead(self.calibration, self.rescale, self.calibration.layer_index(name), head)

    def density(self, layout: TokenLayout) -> float:
        """Computed pairs / S^2, the mean over its layers, heads and steps."""
        heads = {
            CalibratedHead(self.calibration, self.rescale, layer, head)
            for layer in range(len(self.calibration.layers))
            for head in range(self.calibration.heads)
        }
        return sum(head.mean_density(layout) for head in heads) / len(heads)

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        own = [pattern.for_head(None, head) for head, pattern in enumerate(heads)]
        return own[0].layer_attention(own, masks)


@dataclass(frozen=True)
class CalibratedHead(StaticPattern):
    """One head of a calibration; outside of a run what it is at the first step.

    Args:
        calibration, rescale: as of `Calibrated`.
        layer, head: indices.
    """

    calibration: Calibration
    rescale: bool
    layer: int
    head: int
    per_head = True

    @property
    def choices(self) -> tuple[HeadChoice, ...]:
        """For each row of the calibration."""
        return self.calibration.choices(self.layer, self.head, self.rescale)

    @property
    def first(self) -> HeadChoice:
        return self.choices[0]

    @property
    def variants(self) -> Sequence[Pattern]:
        return list(dict.fromkeys(self.choices))

    @property
    def sparse(self) -> bool:
        return any(choice.sparse for choice in self.choices)

    @property
    def own_tail(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(choice.tail for choice in self.choices)

    @property
    def anchor_sees_visual(self) -> bool:
        return self.first.anchor_sees_visual

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        return self.choices[self.calibration.row(step, total, self.rescale)]

    def mean_density(self, layout: TokenLayout) -> float:
        """Over the steps of a run."""
        shares = self.calibration.row_shares
        return sum(s * choice.density(layout) for s, choice in zip(shares, self.choices, strict=True) if s)

    def rule(self, layout: TokenLayout) -> Rule:
        return self.first.rule(layout)

    def visual_pairs(self, layout: TokenLayout) -> int:
        return self.first.visual_pairs(layout)

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        return self.first.natural_orders(layout)

    def token_order(self, layout: TokenLayout, *args, **options) -> torch.Tensor:
        """The model's own: tokens are put into each head's order in its layer."""
        return Pattern.token_order(self, layout)

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        return self.first.layer_attention(heads, masks)

    def __str__(self) -> str:
        kinds = [choice.kind for choice in self.choices]
        return " then ".join(k for n, k in enumerate(kinds) if n == 0 or kinds[n - 1] != k)
