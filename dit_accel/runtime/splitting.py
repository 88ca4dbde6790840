"""Which part of a transformer's calls this process has, as diffusers' `enable_parallelism` split them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dit_accel.attention.shards import Shards
from dit_accel.errors import UnavailableError
from dit_accel.pipelines.families.base import Family

_SPLITS = "ContextParallelSplitHook"
_HOOKS = (_SPLITS, "ContextParallelGatherHook")


def shards_of(transformer: Any, family: Family, layers: list[str], heads: int) -> Shards | None:
    """What this process has; None without context parallelism, or with a kind that layers cannot share by.

    Raises:
        UnavailableError: a family or a model that cannot be shared, or more processes than heads.
    """
    config = getattr(transformer, "_parallel_config", None)
    if config is None or unshared(config) is not None:
        return None
    if family.parallel_plan(transformer) is None:
        raise UnavailableError(
            f"context parallelism is not supported for {type(transformer).__name__} ({family.name}): "
            f"{no_plan(family)}; use one process for each prompt (`accelerate launch`)"
        )
    ulysses = config.context_parallel_config
    if heads < ulysses.ulysses_degree:
        raise UnavailableError(
            f"`ulysses_degree` {ulysses.ulysses_degree} is more than the {heads} heads of this "
            f"{type(transformer).__name__}, which are what processes share; use at most that many"
        )
    return Shards(
        rank=ulysses._ulysses_local_rank,
        count=ulysses.ulysses_degree,
        group=ulysses._ulysses_mesh.get_group(),
        heads=heads,
        layers=frozenset(layers),
        uneven=ulysses.ulysses_anything,
        together=family.split_together,
    )


def no_plan(family: Family) -> str:
    """Why a transformer of a family has no plan of context parallelism."""
    return family.parallel_refusal or "diffusers has no plan for this one of the family's transformers"


def unshared(config: Any) -> str | None:
    """Why accelerated layers cannot share their work by a parallel configuration of diffusers', or None."""
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return (
            "tensor parallelism is not supported in accelerated layers, whose weights must be whole; use "
            "`ContextParallelConfig(ulysses_degree=n)`, make every layer dense, or `dit_accel.disable` first"
        )
    if context.ring_degree > 1:
        return (
            "ring attention is not supported in accelerated layers: it shows a layer one chunk of keys at a "
            "time, and masks are of all of them; use `ContextParallelConfig(ulysses_degree=n)`, make every "
            "layer dense, or `dit_accel.disable` first"
        )
    return None


def check_shared(family: Family, transformer: Any, inputs: dict[str, Any]) -> None:
    """Raise UnavailableError where a call cannot be split as the family's plan has it."""
    reason = family.not_parallel(transformer, inputs)
    if reason is not None:
        raise UnavailableError(f"context parallelism is not supported here: {reason}")


def is_split(module: nn.Module) -> bool:
    """Whether all of diffusers' hooks on a module, of which there are some, split or gather tokens."""
    registry = module.__dict__.get("_diffusers_hook")
    hooks = registry.hooks.values() if registry is not None else ()
    return bool(hooks) and all(type(hook).__name__ in _HOOKS for hook in hooks)


def keep_output(transformer: nn.Module) -> None:
    """Where a plan splits what a transformer takes, let it give what it wants: diffusers asks for tensors."""
    registry = transformer.__dict__.get("_diffusers_hook")
    for hook in registry.hooks.values() if registry is not None else ():
        if type(hook).__name__ == _SPLITS:
            hook.fn_ref.post_forward = lambda module, output: output


class BeforeSplit:
    """Changes the output of a module before it is split among processes, until it is removed.

    Args:
        module: one whose output may be split.
        change: (module, its arguments, its output) to an output, or None for the same.
    """

    def __init__(self, module: nn.Module, change: Callable[[nn.Module, tuple, Any], Any]):
        registry = module.__dict__.get("_diffusers_hook")
        hooks = registry.hooks.values() if registry is not None else ()
        self._split = next((hook for hook in hooks if type(hook).__name__ == _SPLITS), None)
        if self._split is None:
            self._hook = module.register_forward_hook(change)
            return
        split = self._split.post_forward

        def post_forward(module: nn.Module, output: Any) -> Any:
            changed = change(module, (), output)
            return split(module, output if changed is None else changed)

        self._split.fn_ref.post_forward = post_forward

    def remove(self) -> None:
        if self._split is None:
            self._hook.remove()
        else:
            self._split.fn_ref.post_forward = self._split.post_forward
