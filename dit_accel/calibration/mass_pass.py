"""The first pass of a calibration: the mass of attention between blocks, of every head in six orders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dit_accel.attention.call import AttentionCall
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.orders import AXIS_ORDERS
from dit_accel.patterns.reordered_blocks import block_labels
from dit_accel.runtime.switching import Handle
from dit_accel.seeds import generator

from .block_mass import block_mass
from .passes import Runs
from .rows import stretch_rows


class MassPass:
    """Sums of `block_mass`, means over the calls of a row.

    Attributes:
        model: the fields of a `Calibration` that say which model, size and run it is for.
        layout: of the tokens.
        mass: fp32 (rows, layers, heads, 6, n, n) on the CPU.
    """

    name = "mass"

    def __init__(self, options: Mapping[str, Any], most_bytes: int):
        self.options, self.most_bytes = options, most_bytes
        self.model: dict[str, Any] = {}
        self.layout: TokenLayout
        self.mass: torch.Tensor
        self._calls: torch.Tensor  # of each row and layer
        self._labels: list[torch.Tensor] = []

    def over(self, runs: Runs) -> MassPass:
        """Itself, after all prompts."""
        runs.do(self)
        self.mass = self.mass / self._calls.clamp(min=1)[..., None, None, None, None]
        return self

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def see(self, handle: Handle, layer: str, call: AttentionCall, out: torch.Tensor) -> None:
        if not self.model:
            self._begin(handle, call)
        at = place(self.model, handle, layer, call, self.layout)
        sample = self.options["queries"]
        chosen = None
        if sample is not None and sample < self.layout.visual_len:
            seeded = generator(self.options["seed"])
            drawn = torch.randperm(self.layout.visual_len, generator=seeded, device="cpu")
            chosen = drawn[:sample].sort().values
        self.mass[at] += block_mass(call, self._labels, chosen).float().cpu()
        self._calls[at] += 1

    def _begin(self, handle: Handle, call: AttentionCall) -> None:
        size = self.options["block_size"]
        self.model, self.layout = model_of(handle, call, self.options), call.layout
        rows, layers = max(self.model["stretches"]) + 1, len(self.model["layers"])
        blocks = -(-call.layout.visual_len // size)
        shape = (rows, layers, self.model["heads"], len(AXIS_ORDERS), blocks, blocks)
        needed = 4 * math.prod(shape)
        if needed > self.most_bytes:
            raise ValueError(
                f"the sums of {blocks} x {blocks} blocks of every head, order and stretch take "
                f"{needed / 2**30:.1f} GiB, more than `most_bytes` ({self.most_bytes / 2**30:.1f} GiB); use "
                "a larger `block_size` or fewer `stretches`, or allow more"
            )
        self.mass = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self._calls = torch.zeros(shape[:2], dtype=torch.float32, device="cpu")
        self._labels = [block_labels(call.layout.grid, order, size) for order in AXIS_ORDERS]

    def sums(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        layout = [list(self.layout.grid), self.layout.text_len, self.layout.text_first]
        return {"mass": self.mass, "calls": self._calls}, {"model": self.model, "layout": layout}

    def restore(self, tensors: dict[str, torch.Tensor], data: dict[str, Any]) -> None:
        self.mass, self._calls = tensors["mass"], tensors["calls"]
        self.model = {k: tuple(v) if isinstance(v, list) else v for k, v in data["model"].items()}
        grid, *text = data["layout"]
        self.layout = TokenLayout(tuple(grid), *text)
        size = self.options["block_size"]
        self._labels = [block_labels(self.layout.grid, order, size) for order in AXIS_ORDERS]


def model_of(handle: Handle, call: AttentionCall, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Calibration` that say which model, size and run it is for."""
    if handle.total_steps is None:
        raise ValueError("a calibration needs to know the number of steps; calibrate a pipeline")
    binding = next(iter(handle.bindings.values()))
    return {
        "family": binding.family.name,
        "layers": tuple(binding.modules),
        "heads": binding.heads,
        "head_dim": binding.head_dim,
        "grid": call.layout.grid,
        "steps": handle.total_steps,
        "stretches": stretch_rows(handle.total_steps, options["stretches"]),
        "block_size": options["block_size"],
    }


def place(
    model: Mapping[str, Any], handle: Handle, layer: str, call: AttentionCall, layout: TokenLayout
) -> tuple[int, int]:
    """The row and layer that a call belongs to.

    Raises:
        ValueError: a call of another size, or in a run of another number of steps, than the first.
    """
    if call.layout.grid != model["grid"]:
        raise ValueError(
            f"layer {layer} attends on grid {call.layout.grid}, the first call was on {model['grid']}; all "
            "of a calibration is at one size"
        )
    if handle.total_steps != model["steps"]:
        raise ValueError(
            f"a run has {handle.total_steps} steps, the first had {model['steps']}; use the same for all"
        )
    stretches = model["stretches"]
    return stretches[call.step * len(stretches) // model["steps"]], model["layers"].index(layer)
