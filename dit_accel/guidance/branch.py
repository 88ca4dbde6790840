"""The perturbed branch of one transformer: a second, partial forward beside the conditional one.

The branches only diverge at the first perturbed layer. So the output of the block before it is kept, and in
the second forward all blocks up to there give it back instead of running. The pipeline's guidance scale g
need not be known: w (cond - ptb), added to all predictions of a step, comes out of
uncond + g (cond - uncond) as it went in.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.attention import transformer_call
from dit_accel.attention.branch_names import BranchNames, branch_name
from dit_accel.attention.call import LayerAttention, ModelAttention
from dit_accel.attention.perturbed import Perturbed
from dit_accel.attention.transformer_call import TransformerCall
from dit_accel.bounded_dict import make_room
from dit_accel.errors import UnavailableError
from dit_accel.layer_names import flat_indices

from .perturbation import HeadPerturbation

if TYPE_CHECKING:
    from dit_accel.pipelines.families.base import Family
    from dit_accel.runtime.steps import Tick

_RUNS_KEPT = 8


@dataclass(eq=False)
class GuidedRun:
    """What guidance keeps from call to call of one run.

    Attributes:
        forwards, blocks: perturbed forwards, and the blocks they ran.
        evaluation: of the sampler, to which `delta` belongs.
        delta: w (cond - ptb), which goes to all predictions of the evaluation.
    """

    forwards: int = 0
    blocks: int = 0
    evaluation: tuple[int, int | None] | None = None
    delta: torch.Tensor | None = None


@dataclass(eq=False)
class GuidedCall:
    """A call of the transformer that takes part in guidance.

    Attributes:
        run: that it is of.
        evaluation: which one of the run.
        strength: of the perturbation.
        batch: samples.
        conditional: which of them are conditional; None where another call's prediction is only added to.
        inputs: what the forward of these samples gets.
    """

    run: GuidedRun
    evaluation: tuple[int, int | None]
    strength: float
    batch: int
    conditional: slice | None
    inputs: dict[str, Any] | None


@dataclass(eq=False)
class Branch:
    """The perturbed branch of one transformer.

    Attributes:
        perturbation, family, transformer: see `dit_accel.enable`.
        heads: of each layer.
        owner: of the transformer's calls, see `dit_accel.attention.transformer_call`.
        alone: whether every call runs the perturbed model, without guidance.
        layers: perturbed heads and their weights, by layer.
        first, depth: number of blocks before the first perturbed one, and of all.
    """

    perturbation: HeadPerturbation
    family: Family
    transformer: nn.Module
    heads: int
    owner: Any
    alone: bool = False
    _runs: dict[int, GuidedRun] = field(default_factory=dict)
    _inside: dict[int, str] = field(default_factory=dict)  # threads in a call, and their names
    _hook: Any = None
    _shared: Any = None  # output of the block before the first perturbed one, in the call in progress

    def __post_init__(self):
        self._names = BranchNames(self.transformer)
        names = list(self.family.layers(self.transformer))
        weights = self.perturbation.layers(names, self.heads)
        chosen = {name: {h: w for h, w in row.items() if w} for name, row in weights.items()}
        self.layers = {name: row for name, row in chosen.items() if row}
        lists = self.family.blocks(self.transformer)
        self._blocks = [(blocks, i) for blocks in lists for i in range(len(blocks))]
        self.depth = len(self._blocks)
        index = dict(zip(names, flat_indices(names), strict=True))
        first = min((index[name] for name in self.layers), default=self.depth)
        outside = any(index[name] >= self.depth for name in self.layers)  # VACE's run before the others
        self.first = 0 if outside else first

    def __getstate__(self) -> dict[str, Any]:
        """A copy has made no runs yet, and no thread is in a call of it."""
        return {**vars(self), "_runs": {}, "_inside": {}, "_shared": None}

    # -- patching ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        if self.first:
            blocks, index = self._blocks[self.first - 1]
            self._hook = blocks[index].register_forward_hook(self._keep)
        self._names.attach()

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._names.detach()
        self._hook, self._shared, self._runs, self._inside = None, None, {}, {}

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._shared = (
            output  # a plain attribute, which compiled blocks can write: one thread is here at a time
        )

    # -- one call of the transformer -----------------------------------------------------------------------

    def run(self, number: int) -> GuidedRun:
        """What is kept of a run."""
        if number not in self._runs:
            make_room(self._runs, _RUNS_KEPT)
            self._runs[number] = GuidedRun()
        return self._runs[number]

    def begin(self, tick: Tick, pipeline: Any, inputs: dict[str, Any]) -> GuidedCall | None:
        """Before the forward: what this call, which gets `inputs`, is to guidance; None: nothing."""
        self._check_threads()
        run = self.run(tick.run)
        strength = 0.0 if self.alone else self.perturbation.strength_at(tick.step, tick.total)
        if strength == 0 or not self.layers:
            return None
        self._check_caches()
        evaluation = (tick.step, tick.evaluation)
        batch = len(inputs["hidden_states"])
        if self._is_conditional(run, evaluation):
            rows = self.family.conditional(pipeline, inputs)
            return GuidedCall(run, evaluation, strength, batch, rows, take(inputs, rows, batch))
        if run.evaluation != evaluation:
            raise RuntimeError(
                "the unconditional branch of this step was called before the conditional one, which guidance "
                "needs first; call them in the other order, or use guidance=None"
            )
        return GuidedCall(run, evaluation, strength, batch, None, None)

    def _is_conditional(self, run: GuidedRun, evaluation: tuple[int, int | None]) -> bool:
        """By the branch's name, else, in a pipeline, whether it is the first call of its evaluation."""
        name = branch_name()
        if name is not None:
            return "uncond" not in name
        return evaluation[1] is None or evaluation != run.evaluation

    def perturbed_layers(self, call: TransformerCall, strength: float) -> dict[str, LayerAttention]:
        """What layers do in the perturbed branch of a call, from what they do otherwise."""
        layers = dict(call.layers)
        for name, row in self.layers.items():
            own = call.own_heads(name, self.heads)
            chosen = {own.index(head): weight for head, weight in row.items() if head in own}
            if chosen:
                layers[name] = Perturbed(
                    inner=layers.get(name, ModelAttention()),
                    perturbation=self.perturbation,
                    heads=list(chosen),
                    strengths=strength
                    * torch.tensor(list(chosen.values()), dtype=torch.float64, device="cpu"),
                )
        return layers

    def alone_layers(self, call: TransformerCall, tick: Tick) -> Mapping[str, LayerAttention]:
        """The same where every call runs the perturbed model."""
        strength = self.perturbation.strength_at(tick.step, tick.total, alone=True)
        return self.perturbed_layers(call, strength) if strength else call.layers

    def guide(
        self, call: TransformerCall, sample: torch.Tensor, restore: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        """After the forward: its prediction with w (cond - ptb) added, formed in at least fp32.

        `sample` is in the model's own token order; `restore` brings a forward's output there.
        """
        guided: GuidedCall | None = call.guidance
        if guided is None:
            return sample
        run, wide = guided.run, torch.promote_types(sample.dtype, torch.float32)
        if guided.conditional is not None:
            perturbed = restore(self._perturbed(call, guided))
            conditional = sample[guided.conditional].to(wide)
            run.delta = self.perturbation.scale * (conditional - perturbed.to(wide))
            run.evaluation = guided.evaluation
        delta = run.delta
        if delta.shape[1:] != sample.shape[1:] or len(sample) % len(delta):
            raise RuntimeError(
                f"the branches of one step predict {tuple(delta.shape)} and {tuple(sample.shape)}, which "
                "guidance cannot combine; use guidance=None"
            )
        delta = delta.repeat(len(sample) // len(delta), *(1 for _ in delta.shape[1:]))
        return (sample.to(wide) + delta).to(sample.dtype)

    def _perturbed(self, call: TransformerCall, guided: GuidedCall) -> Any:
        """The output of the second forward, of the conditional samples."""
        if self.first and self._shared is None:
            raise RuntimeError(
                "the block before the first layer that guidance perturbs did not run in this call (such as "
                "by `skip_layers`); perturb the first layer as well, or use guidance=None"
            )
        guided.run.forwards += 1
        guided.run.blocks += self.depth - self.first
        second = replace(
            call,
            layers=self.perturbed_layers(call, guided.strength),
            text_valid=take(call.text_valid, guided.conditional, guided.batch),
            guidance=None,
            memory=None if call.memory is None else call.memory.within("perturbed"),
            notes={},
        )
        given_back = take(self._shared, guided.conditional, guided.batch)
        with transformer_call.within(second), self._given_back(given_back):
            return self.transformer.forward(**guided.inputs)

    @contextmanager
    def _given_back(self, output: Any) -> Iterator[None]:
        """Blocks before the first perturbed one give back `output`, for the length of a `with` block."""
        early = [(blocks, i, blocks[i]) for blocks, i in self._blocks[: self.first]]
        stand_in = _GivesBack(output)
        try:
            for blocks, i, _ in early:
                blocks[i] = stand_in
            yield
        finally:
            for blocks, i, block in early:
                blocks[i] = block

    def end(self) -> None:
        """After a call, however it ended."""
        if self._inside.pop(threading.get_ident(), None) is not None:
            self._shared = None

    def _check_threads(self) -> None:
        """Blocks of the one transformer stand aside in the second forward, which another thread would see."""
        mine = threading.get_ident()
        others = ((i, name) for i, name in list(self._inside.items()) if i != mine)
        other = next((name for i, name in others if _is_inside(i, self.transformer)), None)
        if other is not None:
            raise UnavailableError(
                f"guidance of one transformer in two threads at once: thread {other!r} is in a call of it; "
                "make the calls one after the other, give each thread a copy of it, or use "
                "guidance=None"
            )
        self._inside[mine] = threading.current_thread().name

    def _check_caches(self) -> None:
        names = stateful_caches(self.transformer)
        if names:
            raise UnavailableError(
                f"guidance does not work with caches that keep outputs from step to step ({names[0]}); call "
                "`transformer.disable_cache()`, or use guidance=None"
            )

    # -- what it costs -------------------------------------------------------------------------------------

    @property
    def cost(self) -> float:
        """Blocks a perturbed forward runs, as a share of a forward of the conditional samples."""
        return (self.depth - self.first) / self.depth if self.layers and self.perturbation.scale else 0.0

    def describe(self, forwards: int = 0) -> str:
        """One line for `dit_accel.summary`; `forwards` are the perturbed ones of the latest run."""
        guidance, heads = self.perturbation, sum(map(len, self.layers.values()))
        line = f"guidance: {guidance.kind} of {heads} heads in {len(self.layers)} layers"
        line += f", scale {guidance.scale:g}"
        if guidance.start > 0 or guidance.stop < 1:
            line += f", from {guidance.start:.0%} to {guidance.stop:.0%} of the run"
        line += f"; a guided step costs {self.cost:.2f} of a conditional forward more"
        ran = f"{self.depth - self.first} of {self.depth} blocks"
        return line + (f"; latest run: {forwards} perturbed forwards of {ran}" if forwards else "")


def stateful_caches(transformer: nn.Module) -> list[str]:
    """The hooks of diffusers' caches on a transformer that keep outputs from step to step, by class name."""
    registries = (module.__dict__.get("_diffusers_hook") for module in transformer.modules())
    hooks = (hook for registry in registries if registry for hook in registry.hooks.values())
    return [type(hook).__name__ for hook in hooks if hook._is_stateful]


def _is_inside(thread: int, module: nn.Module) -> bool:
    """Whether a thread is in a call of a module, which one that was interrupted in it is no longer."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


class _GivesBack(nn.Module):
    """Stands in for blocks that need not run again."""

    context_pre_only = False  # SD3 asks its blocks, before adding a ControlNet's output

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def take(value: Any, rows: slice, batch: int) -> Any:
    """Those samples of all tensors in `value` that have one row for each of `batch` samples."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: take(item, rows, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take(item, rows, batch) for item in value)
    return value
