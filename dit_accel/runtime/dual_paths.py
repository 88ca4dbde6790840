"""FreeSwim's two branches in the calls of one transformer: which calls hold which, and what they keep."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.attention.branch_names import BranchNames, branch_name
from dit_accel.attention.dual_path import Rows, TextOverride
from dit_accel.attention.transformer_call import TransformerCall
from dit_accel.bounded_dict import make_room
from dit_accel.errors import UnavailableError
from dit_accel.guidance.branch import stateful_caches
from dit_accel.pipelines.families.processors import Accelerated, accelerated
from dit_accel.recipe.recipe import Recipe

from .steps import Tick

if TYPE_CHECKING:
    from .binding import Binding

_RUNS_KEPT = 8
_WITHOUT_SAMPLES = ("img_ids", "txt_ids")  # inputs whose first dimension is of tokens


class DualPaths:
    """The window branch and the full branch of one binding's calls.

    Without `cache_steps` every call holds both branches of all its samples. With it, of the executed steps
    every `cache_steps`-th guides: its conditional samples are in both branches, and what the full one read
    from the text is kept. All other samples are in the window branch alone, the conditional ones with the
    text that was kept.

    Args:
        binding: whose layers are of the kind `attention.dual_path.DualPath`.
        full: the recipe of the full branch.
        cache_steps: how many steps one guided step serves, from 1; None: no cache.
        scale: factor on the scale of attention among visual tokens.
    """

    def __init__(self, binding: Binding, full: Recipe, cache_steps: int | None, scale: float):
        self.binding, self.full, self.cache_steps, self.scale = binding, full, cache_steps, scale
        self.text_layers = binding.family.text_layers(binding.transformer)
        self._names = BranchNames(binding.transformer)
        self._processors: dict[str, Accelerated] = {}
        self._first: dict[int, int] = {}  # by run, the first step that was executed
        if binding.shards is not None:
            raise UnavailableError(
                "the two branches of FreeSwim are not split among processes (context parallelism); use "
                'another method than "swim", or one process for each prompt'
            )
        for name, module in self.text_layers.items():
            reason = binding.family.refusal(module)
            if reason is not None:
                raise UnavailableError(f"layer {name} of this {binding.family.name} transformer {reason}")

    def attach(self) -> None:
        self._names.attach()
        for name, module in self.text_layers.items():
            self._processors[name] = accelerated(module.processor, self.binding, name)
            module.set_processor(self._processors[name])

    def detach(self) -> None:
        self._names.detach()
        for name, processor in self._processors.items():
            processor.owner = None
            if self.text_layers[name].processor is processor:
                self.text_layers[name].set_processor(processor.original)
        self._processors = {}

    def enter(self, inputs: dict[str, Any], tick: Tick, dense: bool) -> tuple[dict[str, Any], Rows]:
        """The inputs of a call with the rows of both branches, and which they are.

        Args:
            inputs: of the transformer's forward, by name.
            tick: of the call.
            dense: whether the full branch's recipe is dense at this step.
        """
        if self.binding.family.chunk_frames(self.binding.transformer, inputs) is not None:
            raise UnavailableError(
                "the dual path needs all frames at one noise level, and this call has a timestep for each "
                '(diffusion forcing); use another method than "swim"'
            )
        batch = len(inputs["hidden_states"])
        rows = Rows(
            batch,
            guided=slice(0, batch),
            full=True,
            memory=None,
            text_len=inputs["encoder_hidden_states"].shape[1],
            scale=self.scale,
            dense=dense,
        )
        if self.cache_steps is not None:
            rows = self._cached(rows, inputs, tick, self.cache_steps)
        return (_doubled(inputs, rows) if rows.full else inputs), rows

    def _cached(self, rows: Rows, inputs: dict[str, Any], tick: Tick, every: int) -> Rows:
        names = stateful_caches(self.binding.transformer)
        if names:
            raise UnavailableError(
                f"`cache_steps={every}` changes how many samples a call holds, which {names[0]} "
                "cannot follow; use cache_steps=None, or `transformer.disable_cache()`"
            )
        if "uncond" in (branch_name() or ""):
            return replace(rows, guided=slice(0, 0), full=False)
        steps = self.binding.steps
        if tick.run not in self._first:
            make_room(self._first, _RUNS_KEPT)
            self._first[tick.run] = tick.step
        return replace(
            rows,
            guided=self.binding.family.conditional(steps.pipeline, inputs),
            full=(tick.step - self._first[tick.run]) % every == 0,
            memory=steps.memory.call(f"{self.binding.name} text", (tick.step, tick.evaluation)),
        )

    def begin(self, call: TransformerCall, rows: Rows) -> TransformerCall:
        """The call with what its layers compute on these rows."""
        layers = {name: layer.of_call(rows, name) for name, layer in call.layers.items()}
        texts = {name: TextOverride(rows).of_call(rows, name) for name in self.text_layers}
        layouts = dict.fromkeys(texts, call.geometry.layout)
        return replace(call, layers=layers | texts, layouts={**call.layouts, **layouts}, rows=rows)


def _doubled(value: Any, rows: Rows) -> Any:
    """All tensors in `value` that have a row for each sample, with those of guided samples once more."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value[rows.guided]]) if value.ndim and len(value) == rows.batch else value
    if isinstance(value, dict):
        return {k: item if k in _WITHOUT_SAMPLES else _doubled(item, rows) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_doubled(item, rows) for item in value)
    return value
