"""What a bound transformer refuses: recipes that it or this machine cannot run, and calls after a change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from dit_accel import kernels
from dit_accel.errors import UnavailableError
from dit_accel.pipelines.families.processors import Accelerated

from .geometry import block_sizes
from .learned_weights import check_learned
from .splitting import unshared

if TYPE_CHECKING:
    from .binding import Binding


def check_recipe(binding: Binding) -> None:
    """Raise UnavailableError where a transformer, its adapter or this machine cannot run the recipe."""
    check_parallel(binding)
    transformer, family, recipe = binding.transformer, binding.family, binding.recipe
    if reason := family.recipe_refusal(recipe):
        raise UnavailableError(f"{type(transformer).__name__} does not take this recipe: {reason}")
    if binding.adapted is not None:
        check_learned(binding.adapted, binding.layers, binding.places, binding.sizes)
    for name in binding.patched_layers:
        reason = family.refusal(binding.modules[name])
        if reason is not None:
            raise UnavailableError(f"layer {name} of this {family.name} transformer {reason}")
    for tail, format in dict.fromkeys((one.tail, one.quantization) for one in binding.layers if one.heads):
        reason = kernels.can_run(
            recipe.backend,
            device=binding.device,
            dtype=binding.dtype,
            head_dim=binding.head_dim,
            block_size=next(iter(block_sizes(recipe, binding.device))),
            quantization=format,
            tail=tail,
        )
        if reason is not None:
            raise UnavailableError(f"backend {recipe.backend!r} cannot run here: {reason}")
    if binding.sparse_layers:
        check_break_even(binding)


def check_break_even(binding: Binding) -> None:
    """Raise UnavailableError where `min_tokens="auto"` has no measured length to go by."""
    if binding.recipe.min_tokens == "auto" and not binding.speed().break_even:
        raise UnavailableError(
            f"`min_tokens='auto'` needs a break-even length, and that of backend {binding.backend!r} was "
            f"not measured on {binding.device.type} in {binding.dtype}; give a number (for a CPU's fastest "
            "backend `dit-accel bench --calibrate` measures it)"
        )


def check_processors(modules: Mapping[str, nn.Module], processors: Mapping[str, Accelerated]) -> None:
    """Raise RuntimeError where an attention layer no longer has the processor that it was given.

    Args:
        modules: attention layers by name.
        processors: ours, of those that have one.
    """
    for name, processor in processors.items():
        if modules[name].processor is not processor:
            raise RuntimeError(
                f"the attention processor of layer {name} was replaced by "
                f"{type(modules[name].processor).__name__} while dit-accel was enabled; call "
                "`dit_accel.disable` before replacing processors (such as loading an IP-Adapter) "
                "and enable again"
            )


def check_parallel(binding: Binding) -> None:
    """Raise UnavailableError where parallelism was switched since, or is of a kind layers cannot share by."""
    config = getattr(binding.transformer, "_parallel_config", None)
    if config is not binding.parallel and (binding.patched_layers or binding.shards is not None):
        raise UnavailableError(
            "parallelism was switched on or off after `dit_accel.enable`; call `enable` again after it"
        )
    if config is not None and binding.shards is None and binding.patched_layers:
        raise UnavailableError(unshared(config))
