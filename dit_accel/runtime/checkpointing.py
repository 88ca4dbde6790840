"""Gradient checkpointing of accelerated transformers: blocks run again in the call they were in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_accel.attention import transformer_call

_NAME = "_gradient_checkpointing_func"  # diffusers', on the transformer


def attach(transformer: nn.Module, owner: Any) -> None:
    """Lets checkpointed blocks find their call in the backward pass; does nothing without checkpointing."""
    function = getattr(transformer, _NAME, None)
    wanted = torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False)
    if wanted and not _is_ours(function):
        setattr(transformer, _NAME, partial(_checkpointed, owner, function))


def detach(transformer: nn.Module) -> None:
    """Puts diffusers' function back."""
    function = getattr(transformer, _NAME, None)
    if _is_ours(function):
        setattr(transformer, _NAME, function.args[1])


def _is_ours(function: Any) -> bool:
    return isinstance(function, partial) and function.func is _checkpointed


def _checkpointed(owner: Any, function: Callable, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return function(_InItsCall(block, transformer_call.current(owner)), *args, **kwargs)


class _InItsCall:
    """A block that runs in the call in which it was first run, whatever call is in progress."""

    def __init__(self, block: nn.Module, call: transformer_call.TransformerCall | None):
        self._block, self._call = block, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is not None and not self._call.owner.attached:
            raise RuntimeError(
                "the backward pass runs the checkpointed blocks of a call again, and the recipe of that call "
                "is not enabled any more; call `backward` before `dit_accel.disable`"
            )
        with transformer_call.within(self._call):
            return self._block(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)
