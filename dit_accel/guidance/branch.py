"""The perturbed branch of one transformer: a second, partial forward beside the conditional one.

The branches only diverge at the first perturbed layer. So the output of the block before it is kept, and in
the second forward all blocks up to there give it back instead of running. The pipeline's guidance scale g
need not be known: w (cond - ptb), added to all predictions of a step, comes out of
uncond + g (cond - uncond) as it went in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import selectors
from ..errors import UnavailableError
from ..layout import TokenLayout
from . import kinds
from .perturbation import HeadPerturbation

if TYPE_CHECKING:
    from ..clock import Clock, Tick
    from ..pipelines.attention import Family, SparseProcessor


@dataclass(frozen=True, eq=False)
class LayerPerturbation:
    """What one attention layer does in the perturbed branch of a call.

    Attributes:
        perturbation: the kind and its options.
        heads: the perturbed heads.
        strengths: theirs, (h,).
        places: int64 (visual_len,), the visual token at each position of the transformer's order, or None
            where that is the model's own.
    """

    perturbation: HeadPerturbation
    heads: list[int]
    strengths: torch.Tensor
    places: torch.Tensor | None

    def __call__(
        self, processor: SparseProcessor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """The layer's attention output, like q (B, H, S, D), with its heads perturbed."""
        out, layout, heads = processor.attend(q, k, v), processor.layout, self.heads
        images = layout.seq_len - layout.text_len
        rows = images if self.perturbation.tokens == "image" else layout.seq_len
        other = self._other(processor, q, k, v, images)
        out = out.clone()
        out[:, heads, :rows] = kinds.mix(out[:, heads, :rows], other[:, :, :rows], self.strengths)
        return out

    def _other(self, processor: SparseProcessor, q, k, v, images: int) -> torch.Tensor:
        """What takes the place of the perturbed heads' output: (B, h, S, D), or its image tokens alone."""
        perturbation, heads = self.perturbation, self.heads
        if perturbation.kind == "uniform":
            return kinds.uniform(v[:, heads], processor.hidden_keys())
        if perturbation.kind == "temperature":
            scale = perturbation.temperature * q.shape[-1] ** -0.5
            return processor.attend(q, k, v, scale=scale, heads=heads)
        if perturbation.kind == "seg":
            blurred = q.clone()
            blurred[:, heads] = self._blurred(q[:, heads], processor.layout, processor.text_valid)
            return processor.attend(blurred, k, v, heads=heads)
        if perturbation.tokens == "all":
            return v[:, heads]
        chosen = (x[:, heads] for x in (q, k, v))
        return kinds.image_identity(*chosen, images, q.shape[-1] ** -0.5, processor.hidden_keys())

    def _blurred(self, q: torch.Tensor, layout: TokenLayout, valid: torch.Tensor | None) -> torch.Tensor:
        """Queries (B, h, S, D) blurred where they stand in the image."""
        sizes = [layout.visual_len, layout.anchor_len, layout.text_len]
        visual, anchor, text = q.split(sizes, dim=2)
        if self.places is not None:
            visual = visual[:, :, torch.argsort(self.places)]
        visual = kinds.blur_grid(visual, layout.grid, self.perturbation.sigma)
        if self.places is not None:
            visual = visual[:, :, self.places]
        if layout.anchor is not None:
            anchor = kinds.blur_grid(anchor, layout.anchor, self.perturbation.sigma)
        if self.perturbation.tokens == "all" and layout.text_len:
            text = kinds.blur_text(text, valid, self.perturbation.sigma)
        return torch.cat([visual, anchor, text], dim=2)


class Call(NamedTuple):
    """A call of the transformer that takes part in guidance.

    `evaluation` says which one of the run; `conditional` are its conditional samples, None where another
    call's prediction is only added to; `inputs` what the forward of these samples gets.
    """

    evaluation: tuple[int, int | None]
    strength: float
    batch: int
    conditional: slice | None
    inputs: dict[str, Any] | None


class Branch:
    """The perturbed branch of one transformer.

    Attributes:
        layers: perturbed heads and their weights, by layer.
        first, depth: number of blocks before the first perturbed one, and of all.
        alone: whether every call runs the perturbed model, without guidance.
        calls, blocks: perturbed forwards of the latest run, and the blocks they ran.
    """

    def __init__(self, perturbation: HeadPerturbation, family: Family, transformer: nn.Module, heads: int):
        self.perturbation, self.family, self.transformer = perturbation, family, transformer
        names = list(family.layers(transformer))
        weights = perturbation.layers(names, heads)
        chosen = {name: {h: w for h, w in row.items() if w} for name, row in weights.items()}
        self.layers = {name: row for name, row in chosen.items() if row}
        self._blocks = [(blocks, i) for blocks in family.blocks(transformer) for i in range(len(blocks))]
        self.depth = len(self._blocks)
        index = dict(zip(names, selectors.flat_indices(names), strict=True))
        first = min((index[name] for name in self.layers), default=self.depth)
        outside = any(index[name] >= self.depth for name in self.layers)  # VACE's run before the others
        self.first = 0 if outside else first
        self.alone = False
        self.calls = self.blocks = 0
        self._run: int | None = None
        self._shared: Any = None  # output of the block before the first perturbed one, in the latest call
        self._call: Call | None = None
        self._evaluation: tuple | None = None  # of the delta
        self._delta: torch.Tensor | None = None
        self._name: str | None = None  # of the branch, inside diffusers' `cache_context`
        self._hook: Any = None

    # -- patching ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        if self.first:
            blocks, index = self._blocks[self.first - 1]
            self._hook = blocks[index].register_forward_hook(self._keep)
        if hasattr(self.transformer, "cache_context"):
            self.transformer.cache_context = self._cache_context

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self.transformer.__dict__.get("cache_context") == self._cache_context:
            del self.transformer.cache_context
        self._hook = self._shared = self._call = self._delta = self._evaluation = None

    @contextmanager
    def _cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """diffusers' `cache_context`, which is not readable but while caches are on."""
        self._name = name
        try:
            with type(self.transformer).cache_context(self.transformer, name, **kwargs):
                yield
        finally:
            self._name = None

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._call is not None and self._call.conditional is not None:
            self._shared = output

    # -- one call of the transformer -----------------------------------------------------------------------

    def begin(
        self, tick: Tick, clock: Clock, inputs: dict[str, Any], perturb: Callable[[float], None]
    ) -> None:
        """Before the forward: what this call is to guidance.

        `inputs` are those the forward gets; `perturb` makes it a perturbed one, at a strength.
        """
        if tick.run != self._run:
            self._run, self.calls, self.blocks = tick.run, 0, 0
            self._evaluation = self._delta = None
        self._call = self._shared = None
        strength = self.perturbation.strength_at(tick.step, tick.total, self.alone)
        if self.alone:
            perturb(strength)
        if self.alone or strength == 0 or not self.layers:
            return
        self._check_caches()
        key = (tick.step, clock.evaluation)
        batch = len(inputs["hidden_states"])
        if self._is_conditional(key):
            rows = self.family.conditional(clock.pipeline, inputs)
            self._call = Call(key, strength, batch, rows, take(inputs, rows, batch))
        elif self._evaluation == key:
            self._call = Call(key, strength, batch, None, None)
        else:
            raise RuntimeError(
                "the unconditional branch of this step was called before the conditional one, which guidance "
                "needs first; call them in the other order, or use guidance=None"
            )

    def _is_conditional(self, key: tuple[int, int | None]) -> bool:
        """By the branch's name, else, in a pipeline, whether it is the first call of its evaluation."""
        if self._name is not None:
            return "uncond" not in self._name
        return key[1] is None or key != self._evaluation

    def guide(self, sample: torch.Tensor, predict: Callable[[Call], torch.Tensor]) -> torch.Tensor:
        """After the forward: its prediction with w (cond - ptb) added, formed in at least fp32.

        `predict` runs the perturbed forward, in the model's own token order.
        """
        call, self._call = self._call, None
        if call is None:
            return sample
        wide = torch.promote_types(sample.dtype, torch.float32)
        if call.conditional is not None:
            perturbed = predict(call)
            self._delta = self.perturbation.scale * (sample[call.conditional].to(wide) - perturbed.to(wide))
            self._evaluation, self._shared = call.evaluation, None
        delta = self._delta
        if delta.shape[1:] != sample.shape[1:] or len(sample) % len(delta):
            raise RuntimeError(
                f"the branches of one step predict {tuple(delta.shape)} and {tuple(sample.shape)}, which "
                "guidance cannot combine; use guidance=None"
            )
        delta = delta.repeat(len(sample) // len(delta), *(1 for _ in delta.shape[1:]))
        return (sample.to(wide) + delta).to(sample.dtype)

    def perturbed(self, call: Call) -> Any:
        """The output of the second forward, of the conditional samples; the layers already perturb."""
        if self.first and self._shared is None:
            raise RuntimeError(
                "the block before the first layer that guidance perturbs did not run in this call (such as "
                "by `skip_layers`); perturb the first layer as well, or use guidance=None"
            )
        self.calls += 1
        self.blocks += self.depth - self.first
        with self._given_back(take(self._shared, call.conditional, call.batch)):
            return self.transformer.forward(**call.inputs)

    def layer_perturbations(
        self, strength: float, places: torch.Tensor | None
    ) -> dict[str, LayerPerturbation]:
        """What the perturbed layers do at a strength, in a token order."""
        return {
            name: LayerPerturbation(
                self.perturbation,
                list(row),
                strength * torch.tensor(list(row.values()), dtype=torch.float64),
                places,
            )
            for name, row in self.layers.items()
        }

    @contextmanager
    def _given_back(self, output: Any) -> Iterator[None]:
        """Blocks before the first perturbed one give back `output`, for the length of a `with` block."""
        early = [(blocks, i, blocks[i]) for blocks, i in self._blocks[: self.first]]
        stand_in = _GivesBack(output)
        for blocks, i, _ in early:
            blocks[i] = stand_in
        try:
            yield
        finally:
            for blocks, i, block in early:
                blocks[i] = block

    def _check_caches(self) -> None:
        registries = (m.__dict__.get("_diffusers_hook") for m in self.transformer.modules())
        hooks = (hook for registry in registries if registry for hook in registry.hooks.values())
        names = [type(hook).__name__ for hook in hooks if hook._is_stateful]
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

    def describe(self) -> str:
        """One line for `dit_accel.summary`."""
        guidance, heads = self.perturbation, sum(map(len, self.layers.values()))
        line = f"guidance: {guidance.kind} of {heads} heads in {len(self.layers)} layers"
        line += f", scale {guidance.scale:g}"
        if guidance.start > 0 or guidance.stop < 1:
            line += f", from {guidance.start:.0%} to {guidance.stop:.0%} of the run"
        line += f"; a guided step costs {self.cost:.2f} of a conditional forward more"
        ran = f"{self.depth - self.first} of {self.depth} blocks"
        return line + (f"; latest run: {self.calls} perturbed forwards of {ran}" if self.calls else "")


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
