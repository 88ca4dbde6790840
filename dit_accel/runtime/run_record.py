"""What a run of an enabled recipe did: calls, densities, dense steps, and what layers told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dit_accel.attention.transformer_call import TransformerCall

from .geometry import Geometry
from .guard import Guarded
from .steps import Tick


class Achieved(NamedTuple):
    """What a layer that chooses by content computed in one call.

    Attributes:
        step: sampler step.
        densities: shares of all pairs and of all blocks, float64 (2,), on the device.
        expected: the same as its pattern aims at.
        share: of the pairs of all layers.
    """

    step: int
    densities: torch.Tensor
    expected: tuple[float, float]
    share: float


@dataclass(eq=False)
class RunRecord:
    """One run.

    Attributes:
        run: its number.
        steps: how many it has; None: not known.
        calls: of transformers.
        dense_steps: those that were dense.
        grids: of visual tokens, by transformer, in its latest call.
        notes: by transformer and layer, what kinds of attention told last.
        achieved: by transformer and layer, what layers that choose by content computed in each call.
        guarded: by transformer, the latest prediction that is being looked at (see `guard`).
        sent_bytes: what attention sent from this process to those that it shares transformers with.
    """

    run: int
    steps: int | None = None
    calls: int = 0
    dense_steps: set[int] = field(default_factory=set)
    grids: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    notes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    achieved: dict[str, dict[str, list[Achieved]]] = field(default_factory=dict)
    guarded: dict[str, Guarded] = field(default_factory=dict)
    sent_bytes: int = 0
    _density: float = 0.0
    _block_density: float = 0.0
    _of_steps: dict[int, list[float]] = field(default_factory=dict)  # of its calls, their densities

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "guarded": {}}  # which hold the inputs of a call

    @property
    def density(self) -> float | None:
        """Computed share of all pairs, dense layers and steps included; None before a call."""
        return (self._density + self._difference[0]) / self.calls if self.calls else None

    @property
    def block_density(self) -> float | None:
        """The same in whole blocks: what a block-sparse kernel pays."""
        return (self._block_density + self._difference[1]) / self.calls if self.calls else None

    @property
    def _difference(self) -> list[float]:
        """Of all calls, what was computed less what patterns aim at; waits for the device."""
        told = [one for layers in self.achieved.values() for calls in layers.values() for one in calls]
        if not told:
            return [0.0, 0.0]
        share = torch.tensor([one.share for one in told], dtype=torch.float64, device="cpu")
        expected = torch.tensor([one.expected for one in told], dtype=torch.float64, device="cpu")
        return (share @ (torch.stack([one.densities for one in told]).cpu() - expected)).tolist()

    def achieved_by_step(self, transformer: str, layer: str) -> dict[int, list[float]]:
        """Density and block density that a layer which chooses by content reached at each of its steps.

        The mean over the calls of a step (guidance branches); empty before one.
        """
        calls = self.achieved.get(transformer, {}).get(layer, [])
        if not calls:
            return {}
        steps = torch.tensor([one.step for one in calls], dtype=torch.int64, device="cpu")
        densities = torch.stack([one.densities for one in calls]).cpu()
        return {step: densities[steps == step].mean(0).tolist() for step in steps.unique().tolist()}

    @property
    def step_densities(self) -> dict[int, float]:
        """Computed share of all pairs by step, the mean over its calls; waits for the device."""
        sums = {step: sum(densities) for step, densities in sorted(self._of_steps.items())}
        for one in (one for layers in self.achieved.values() for calls in layers.values() for one in calls):
            sums[one.step] += one.share * (float(one.densities[0]) - one.expected[0])
        return {step: total / len(self._of_steps[step]) for step, total in sums.items()}

    def count(self, tick: Tick, geometry: Geometry | None, dense: bool) -> None:
        """Counts a call that computes what `geometry` says, None: all pairs; `dense`: whether its step is."""
        self.calls += 1
        self.steps = tick.total
        density = blocks = 1.0
        if dense:
            self.dense_steps.add(tick.step)
        if geometry is not None:
            density = geometry.over_layers(geometry.densities)
            blocks = geometry.over_layers(geometry.block_densities)
        self._density += density
        self._block_density += blocks
        self._of_steps.setdefault(tick.step, []).append(density)

    def temporal_heads(self, transformer: str) -> dict[str, float]:
        """By layer, the share of temporal heads among those that choose, when they last did."""
        return {
            layer: float(said["temporal heads"][:, said["choosing heads"]].double().mean())
            for layer, said in self.notes.get(transformer, {}).items()
            if "temporal heads" in said
        }

    def note(self, transformer: str, call: TransformerCall) -> None:
        """Takes what layers told in a call."""
        told = {layer: said for layer, said in call.notes.items() if said}
        if told:
            self.notes.setdefault(transformer, {}).update(told)
        for layer, said in told.items():
            self.sent_bytes += said.get("sent bytes", 0)
            if "achieved" in said:
                layouts, geometry, index = call.layouts, call.geometry, list(call.layouts).index(layer)
                share = layouts[layer].pairs / sum(one.pairs for one in layouts.values())
                expected = geometry.densities[index], geometry.block_densities[index]
                calls = self.achieved.setdefault(transformer, {}).setdefault(layer, [])
                calls.append(Achieved(call.step, said["achieved"], expected, share))
