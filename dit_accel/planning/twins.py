"""FLOPs of a forward on the meta device, without running blocks that are like one that was counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def counting(transformer: nn.Module) -> Iterator[FlopCounterMode]:
    """Counts what a transformer computes within it, of the entries of its module lists one of each kind.

    Entries are of one kind if their modules, the shapes of their parameters and their settings are the same,
    and if they get inputs of the same shapes: without values, as tensors on the meta device are, one computes
    as much as the other, and what it returns has the same shapes.
    """
    name = type(transformer).__name__
    with FlopCounterMode(display=False) as counter, ExitStack() as stack:
        seen: dict[Any, tuple[dict, Any, list]] = {}  # by kind and inputs: counts, outputs, inputs
        for path, module in transformer.named_modules():
            if isinstance(module, nn.ModuleList):
                for place, block in module.named_children():
                    forward = partial(
                        _forward, block.forward, _kind(block), f"{name}.{path}.{place}", counter, seen
                    )
                    stack.enter_context(mock.patch.object(block, "forward", forward))
        yield counter


def _forward(
    forward: Any, kind: Any, path: str, counter: FlopCounterMode, seen: dict, /, *args: Any, **kwargs: Any
) -> Any:
    """What a block returns, computed or like that of its twin, whose counts it gets."""
    leaves, structure = tree_flatten((args, kwargs))
    if not all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in leaves):
        return forward(*args, **kwargs)
    key = kind, str(structure), tuple(map(_leaf, leaves))
    counts = counter.flop_counts
    if key not in seen:
        before = _inside(counts, path)
        made = forward(*args, **kwargs)
        after = _inside(counts, path)
        added = {
            name: {operation: n - before.get(name, {}).get(operation, 0) for operation, n in of_name.items()}
            for name, of_name in after.items()
        }
        seen[key] = added, made, leaves  # which live on, as the identities of some are part of the key
        return made
    added, made, _ = seen[key]
    for name, of_name in added.items():
        for operation, n in of_name.items():
            counts[path + name][operation] += n
    for name in counter.mod_tracker.parents - {path}:
        for operation, n in added.get("", {}).items():
            counts[name][operation] += n
    return tree_map(lambda x: torch.empty_like(x) if isinstance(x, torch.Tensor) else x, made)


def _inside(counts: dict[str, dict], path: str) -> dict[str, dict]:
    """Copies of the counts of a module and of those within it, by their names in it."""
    return {
        name[len(path) :]: dict(of_name)
        for name, of_name in counts.items()
        if name == path or name.startswith(f"{path}.")
    }


def _leaf(value: Any) -> Any:
    """What a block's work may depend on; masks are told apart, as planning gives them values."""
    if not isinstance(value, torch.Tensor):
        return type(value), value
    return value.shape, value.dtype, value.device, id(value) if value.dtype == torch.bool else None


def _kind(block: nn.Module) -> Any:
    """What two blocks share that compute the same of inputs of the same shapes."""
    return tuple(
        (
            path,
            type(module),
            tuple((name, x.shape, x.dtype) for name, x in module.named_parameters(recurse=False)),
            _settings(module),
        )
        for path, module in block.named_modules()
    )


def _settings(owner: Any) -> Any:
    """The attributes of a module or of its processor, as far as they are plain, and the types of others."""
    found = []
    for name, value in sorted(getattr(owner, "__dict__", {}).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, list | tuple) and all(isinstance(item, _PLAIN) for item in value):
            value = tuple(value)
        elif not isinstance(value, _PLAIN):
            value = type(value), _settings(value) if isinstance(owner, nn.Module) else ()
        found.append((name, value))
    return tuple(found)
