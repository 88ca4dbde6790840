"""Context parallelism on diffusers' engine: tokens over processes, and inside attention heads (Ulysses)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.errors import UnavailableError
from dit_accel.pipelines.families import family_of
from dit_accel.runtime.splitting import keep_output, no_plan
from dit_accel.runtime.switching import handle_of, transformers_of


def plan_of(transformer: Any) -> dict[str, Any]:
    """The `cp_plan` for `transformer.enable_parallelism`: what is split among processes where.

    Diffusers' own for most families that it has one for. Plans for others are for accelerated transformers,
    as their stock attention knows nothing of other processes or masks tokens in another order: so
    `dit_accel.enable` them, with the recipe `Dense()` at least.

    Raises:
        UnavailableError: a family without a plan.
    """
    family = family_of(transformer)
    plan = family.parallel_plan(transformer)
    if plan is None:
        raise UnavailableError(
            f"there is no plan for context parallelism of {type(transformer).__name__} ({family.name}): "
            f"{no_plan(family)}; use one process for each prompt (`accelerate launch`)"
        )
    return plan


def context_parallel(target: Any, degree: int | None = None) -> None:
    """Share every call of a pipeline's transformers among processes, on GPUs or, with gloo, on CPUs.

    What diffusers' `enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree,
    ulysses_anything=True))` does, with this toolkit's plans for families that diffusers has none for. Call it
    before `dit_accel.enable`, in every process, after `torch.distributed.init_process_group`; all processes
    must then make the same calls with the same inputs, and get the same outputs.

    Args:
        target: a diffusers pipeline, or a transformer.
        degree: how many processes; None: all.

    Raises:
        UnavailableError: a family without a plan, a transformer that is enabled or shared already, or
            `torch.distributed` not initialised; then none is changed.
        ValueError: a degree that is not from 2 to the number of processes.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise UnavailableError(
            "`context_parallel` needs several processes: start them with `torchrun` or `accelerate launch`, "
            "and call `torch.distributed.init_process_group` first"
        )
    world = torch.distributed.get_world_size()
    degree = world if degree is None else degree
    if not 2 <= degree <= world:
        raise ValueError(f"`degree` must be from 2 to the {world} processes there are, got {degree}")
    transformers = transformers_of(target).values()
    plans = [plan_of(transformer) for transformer in transformers]
    for transformer in transformers:
        if handle_of(transformer) is not None:
            raise UnavailableError(
                "call `context_parallel` before `dit_accel.enable`, which asks what a process shares"
            )
        if getattr(transformer, "_parallel_config", None) is not None:
            raise UnavailableError(
                f"processes share the calls of this {type(transformer).__name__} already; load the pipeline "
                "anew to share them otherwise"
            )
    for transformer, plan in zip(transformers, plans, strict=True):
        _enable(transformer, degree, plan)
        _leave_whole(transformer)
        keep_output(transformer)
        if getattr(transformer, "_cp_plan", None) is None:
            transformer.register_forward_pre_hook(_check_enabled)


def _enable(transformer: Any, degree: int, plan: dict[str, Any]) -> None:
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=True)
    if transformer.device.type != "cpu":
        transformer.enable_parallelism(config=config, cp_plan=plan)
        return
    # diffusers asks for an accelerator
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = config.mesh_dim_names
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=names)
    config.setup(rank, world, torch.device("cpu"), mesh)
    transformer._parallel_config = ParallelConfig(context_parallel_config=config)
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = transformer._parallel_config
    apply_context_parallel(transformer, config, plan)


def _leave_whole(transformer: Any) -> None:
    """Attention to keys that every process has, such as those of text, exchanges nothing."""
    family = family_of(transformer)
    split = {*family.layers(transformer).values(), *family.exchanging(transformer)}
    for module in set(transformer.modules()) - split:
        processor = getattr(module, "processor", None)
        if getattr(processor, "_parallel_config", None) is not None:
            processor._parallel_config = None


def _check_enabled(transformer: nn.Module, args: tuple) -> None:
    if handle_of(transformer) is None:
        raise UnavailableError(
            f"the plan for context parallelism of {type(transformer).__name__} is for accelerated attention; "
            "call `dit_accel.enable(transformer, recipe)` first, with `Dense()` where nothing is to be sparse"
        )
