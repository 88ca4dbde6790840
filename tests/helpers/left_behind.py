"""What something may have left on a transformer: attributes, hooks and processors of all its modules."""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
_REPLACED = ("processor", "forward", "_gradient_checkpointing_func", "cache_context", "set_processor")


def state_of(transformer: nn.Module) -> dict[str, Any]:
    """By module, what two untouched transformers have in common before and after; weights are left out."""
    return {
        name: (
            sorted(
                vars(module).keys() - {"_diffusers_hook"}
            ),  # of `cache_context`, empty while there is no cache
            [list(vars(module)[hooks].values()) for hooks in _HOOKS if hooks in vars(module)],
            [vars(module).get(attribute) for attribute in _REPLACED],
        )
        for name, module in transformer.named_modules()
    }
