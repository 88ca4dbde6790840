"""Parts of plans of context parallelism: which tokens are split among processes, and where they join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def split_outputs(places: Mapping[str, Mapping[int, int]]) -> dict[str, Any]:
    """A plan that splits outputs of modules, and gathers that of `proj_out`.

    Args:
        places: by module name, of each output that is split (by its number) the dimension of tokens.
    """
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    plan: dict[str, Any] = {
        name: {i: ContextParallelInput(split_dim=dim, split_output=True) for i, dim in outputs.items()}
        for name, outputs in places.items()
    }
    return plan | {"proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)}


def split_inputs(module: str, names: Sequence[str]) -> dict[str, Any]:
    """The part of a plan that splits inputs (B, S, C) of a module along their tokens."""
    return {module: {name: _second(3) for name in names}}


def split_tokens(*inputs: tuple[str, int]) -> dict[str, Any]:
    """The part that splits inputs (B, S, ...) of the transformer, by name, that have so many dimensions."""
    return {"": {name: _second(dims) for name, dims in inputs}}


def split_pair(dim: int) -> list[Any]:
    """What splits both tables of a rotary embedding, which a module takes as a pair, along a dimension."""
    from diffusers.models._modeling_parallel import ContextParallelInput

    return [ContextParallelInput(split_dim=dim)] * 2


def split_blocks(
    name: str, transformer: Any, first: Mapping[str, int], every: Mapping[str, int | None]
) -> dict[str, Any]:
    """The part that splits tokens where they enter a list of blocks, and gathers them where they leave it.

    Args:
        name: of the list in the transformer.
        first: inputs (B, S, ...) of its first block by name, with their number of dimensions.
        every: the same of all its blocks; None: of any number.
    """
    from diffusers.models._modeling_parallel import ContextParallelOutput

    count = len(getattr(transformer, name))
    entering = {input: _second(dims) for input, dims in first.items()}
    inside = {input: _second(dims) for input, dims in every.items()}
    plan: dict[str, Any] = {f"{name}.*": inside if count > 1 else inside | entering}
    if count > 1:
        plan[f"{name}.0"] = entering
    return plan | {f"{name}.{count - 1}": ContextParallelOutput(gather_dim=1, expected_dims=3)}


def _second(dims: int | None) -> Any:
    from diffusers.models._modeling_parallel import ContextParallelInput

    return ContextParallelInput(split_dim=1, expected_dims=dims)
