"""The student: a transformer under a recipe, with the weights that are trained beside its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel import kernels
from dit_accel.errors import UnavailableError
from dit_accel.patterns import Dense
from dit_accel.recipe import adapter as files
from dit_accel.recipe.adapter_parts import Learned, LowRank, Part, Whole
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.adapted import Adapted
from dit_accel.runtime.binding import Binding
from dit_accel.runtime.switching import Handle, accelerated
from dit_accel.training_loop import Draw

from .taps import Outputs, Taps


class Weights(nn.Module):
    """What is trained: A and B of LoRA, or whole weights, and what patterns learn; in fp32.

    A is drawn and B is 0, whole weights are the model's and learned weights as patterns say: at first nothing
    is changed.

    Args:
        layers: linear layers by name.
        learned: learned weights before training, by the name of an attention module and their own.
        rank: of the LoRA; None: whole weights.
        draw: draws A.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        learned: Mapping[str, Mapping[str, torch.Tensor]],
        rank: int | None,
        draw: Draw,
    ):
        super().__init__()
        self.names, self.rank = list(layers), rank
        self.places = [(module, name) for module, own in learned.items() for name in own]
        tensors: list[torch.Tensor] = []
        for own in layers.values():
            if rank is not None:
                a = draw.normal((rank, own.in_features)) / own.in_features**0.5
                tensors += [a, torch.zeros(own.out_features, rank, dtype=torch.float32, device="cpu")]
            else:
                given = [own.weight] if own.bias is None else [own.weight, own.bias]
                tensors += [x.detach().float().clone() for x in given]
        self.counts = [2 if rank is not None or own.bias is not None else 1 for own in layers.values()]
        self.own = nn.ParameterList(tensors)
        self.learned = nn.ParameterList(x.clone() for own in learned.values() for x in own.values())

    def tensors(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """By layer A and B, or weight and bias."""
        each = iter(self.own)
        return {
            name: tuple(next(each) for _ in range(count))
            for name, count in zip(self.names, self.counts, strict=True)
        }

    def learned_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """By attention module and name."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for (module, name), x in zip(self.places, self.learned, strict=True):
            found.setdefault(module, {})[name] = x
        return found


class Student:
    """A transformer that is asked as it is, under the recipe, and densely with what is trained.

    Args:
        transformer: is left as it is; what is trained stands beside it.
        recipe: what it is trained to; dense steps, guidance and an adapter are left out.
        train: names of projections that are trained in place of those of the patterns.
        rank: of the LoRA; None: whole weights.
        draw: draws the LoRA.
        out: where the adapter will be.

    Attributes:
        layers: attention modules by name.
        changed: names of those that the recipe changes.
        weights: what is trained.
        taps: whose attention outputs are recorded; to be set.

    Raises:
        ValueError: a recipe that changes nothing, names that no layer has.
        UnavailableError: a recipe without gradients.
    """

    def __init__(
        self,
        transformer: nn.Module,
        recipe: Recipe,
        train: Sequence[str] | None,
        rank: int | None,
        draw: Draw,
        out: Path,
    ):
        self.transformer, self.recipe = transformer, recipe
        self.taps = Taps({})
        with accelerated(transformer, recipe) as handle:
            binding = handle.bindings["transformer"]
            self.family = binding.family
            self.layers, self.changed = dict(binding.modules), binding.sparse_layers
            layers, learned = _trained(binding, train)
        self.weights = Weights(layers, learned, rank, draw).to(binding.device)
        self.part = Part(
            out / files.WEIGHTS,
            {},
            {
                name: Whole(own.in_features, own.out_features, own.bias is not None)
                if rank is None
                else LowRank(rank, own.in_features, own.out_features, 1.0)
                for name, own in layers.items()
            },
            {
                module: {name: Learned("", tuple(x.shape)) for name, x in own.items()}
                for module, own in learned.items()
            },
        )
        self.adapted = Adapted(transformer, self.part, str(out))
        self._handle: Handle | None = None

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """The recipe and what is trained are on for the length of a `with` block."""
        with accelerated(self.transformer, self.recipe) as handle:
            self._handle = handle
            self.adapted.attach(self.weights.tensors(), self.weights.learned_weights())
            handle.bindings["transformer"].adapted = self.adapted  # from now on it comes and goes with it
            try:
                yield
            finally:
                self._handle = None

    @torch.no_grad()
    def teacher(self, inputs: Mapping[str, Any], record: bool = True) -> tuple[torch.Tensor, Outputs]:
        """What the untouched model predicts, and its attention outputs."""
        with accelerated(self.transformer, Dense()), self._recording(record, dense=True) as found:
            return self._velocity(inputs), found

    @contextmanager
    def student(
        self, inputs: Mapping[str, Any], dense: bool, record: bool = True, adapter: bool = True
    ) -> Iterator[tuple[torch.Tensor, Outputs]]:
        """What it predicts under the recipe, or densely, with what is trained or without.

        Gradients are to be asked for inside of the `with` block.
        """
        attention: AbstractContextManager[Any] = nullcontext()
        if dense:
            attention = accelerated(self.transformer, Recipe(Dense(), guard=False))
        with attention:
            if dense:
                self.adapted.attach()
            if not adapter:
                self.adapted.detach()
            try:
                with self._recording(record, dense) as found:
                    velocity = self._velocity(inputs)
                yield velocity, found
            finally:
                if dense:
                    self.adapted.detach()
                elif not adapter:
                    self.adapted.attach()

    def _velocity(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Noise less latents, as the transformer predicts it, fp32."""
        output = self.transformer(**inputs, return_dict=False)
        sample = output if isinstance(output, torch.Tensor) else output[0]
        predicted = self.family.predicted(sample).float()
        return -predicted if self.family.toward_data else predicted

    def _recording(self, record: bool, dense: bool) -> AbstractContextManager[Outputs]:
        handle = self._handle
        if not record or handle is None:
            return nullcontext({})
        order = (lambda: None) if dense else handle.token_order
        return self.taps.recording(order, lambda: handle.bindings["transformer"].geometry.layout)

    def save(self, out: Path, about: Mapping[str, Any]) -> None:
        """Write the adapter's folder: LoRA in fp32, whole weights in the dtype of the transformer."""
        learned = self.weights.learned_weights()
        if self.weights.rank is not None:
            pairs = {name: (pair[0], pair[1]) for name, pair in self.weights.tensors().items()}
            files.write(out, pairs, float(self.weights.rank), about, learned)
            return
        dtype = getattr(self.transformer, "dtype", torch.float32)
        tensors = {name: tuple(x.to(dtype) for x in own) for name, own in self.weights.tensors().items()}
        files.write_weights(out, tensors, about, learned)


def _trained(
    binding: Binding, train: Sequence[str] | None
) -> tuple[dict[str, nn.Linear], dict[str, dict[str, torch.Tensor]]]:
    """Linear layers that are trained, and learned weights by attention module, of changed layers.

    Raises:
        ValueError: nothing to train, or names that no layer has.
        UnavailableError: something else in the place of a linear layer, or pooling of several sizes.
    """
    if not binding.sparse_layers:
        raise ValueError("the recipe makes no layer of this model sparse: there is nothing to train")
    places = {module: name for name, module in binding.transformer.named_modules()}
    layers: dict[str, nn.Linear] = {}
    learned: dict[str, dict[str, torch.Tensor]] = {}
    seen: set[str] = set()
    for plan in (plan for plan in binding.layers if plan.heads):
        module = binding.modules[plan.name]
        usual = dict.fromkeys(name for pattern in plan.patterns for name in pattern.trained)
        projections = binding.family.projections
        names = train or {*usual, *(projections[name] for name in usual if name in projections)}
        for name, part in module.named_modules():
            if name in names and isinstance(part, nn.Linear):
                layers[f"{places[module]}.{name}"] = part
                seen.add(name)
            elif name in names and hasattr(part, "in_features"):
                kind = f"{type(part).__module__}.{type(part).__name__}"
                raise UnavailableError(
                    f"{places[module]}.{name} is a {kind} and no plain linear layer, and would be left out; "
                    "unload LoRA, or take a model that is not quantized"
                )
        factors = {variant.pools for pattern in plan.patterns for variant in pattern.variants} - {0}
        if len(factors) > 1:
            raise UnavailableError(
                f"heads of layer {plan.name} pool patches of {sorted(factors)} tokens a side, and a layer "
                "has one set of pooling weights; use one `downsample` in each layer"
            )
        for variant in (variant for pattern in plan.patterns for variant in pattern.variants):
            if own := variant.learned(binding.sizes[plan.name]):
                learned.setdefault(places[module], {}).update(own)
    missing = [name for name in train or () if name not in seen]
    if missing or not layers:
        raise ValueError(
            f"`train` names {missing[0]!r}, which no changed layer of this model has as a linear layer"
            if missing
            else "the changed layers of this model have none of the projections that are trained as linear "
            "layers; unload LoRA, and unfuse projections"
        )
    return layers, learned


def trainable(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Recipe:
    """The recipe as it is trained: every step sparse, whatever the size, and nothing beside attention.

    Raises:
        ValueError: patterns that change with the noise level.
        UnavailableError: attention that has no gradients here.
    """
    if recipe.quantization is not None:
        raise UnavailableError(
            "quantized attention has no gradients; distil to the recipe without `quantization`"
        )
    if any(pattern.by_noise for pattern in recipe.patterns):
        raise ValueError(
            "patterns that change with the noise level cannot be distilled to; distil to one of them"
        )
    size = recipe.block_size or kernels.default_block_size(device)
    reason = kernels.can_run(
        recipe.backend, device=device, dtype=dtype, head_dim=32, block_size=size, requires_grad=True
    )
    if reason is not None:
        raise UnavailableError(f"backend {recipe.backend!r} cannot be trained here: {reason}; leave it out")
    return replace(recipe, dense_steps=0, adapter=None, guidance=None, guard=False, min_tokens=0)
