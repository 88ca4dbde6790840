"""Configuration values that a transformer's forward must not see in accelerated calls.

SkyReels-V2's forward makes a mask (S, S) where its configuration says `num_frame_per_block`. Pipelines read
and write the same value between calls, and other threads in calls of their own: only who is in an accelerated
call is shown the other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import nn

from dit_accel.attention import transformer_call

_PLACE = "_internal_dict"  # where diffusers keeps a configuration


class _Hiding(FrozenDict):
    """The configuration itself; attributes are those that are shown, entries the real ones."""

    def __getattribute__(self, name: str) -> Any:
        state = super().__getattribute__("__dict__")
        shown = state.get("_shown", {})
        if name in shown and transformer_call.current(state["_owner"]) is not None:
            return shown[name]
        return super().__getattribute__(name)


def attach(transformer: nn.Module, shown: Mapping[str, Any], owner: Any) -> None:
    """Show these values in the calls of `owner`; where a pipeline has set the configuration anew, again."""
    config = getattr(transformer, _PLACE)
    if not shown or isinstance(config, _Hiding):
        return
    hiding = _Hiding(config)
    hiding.__dict__.update(_shown=dict(shown), _owner=owner)
    setattr(transformer, _PLACE, hiding)


def detach(transformer: nn.Module) -> None:
    """Put a plain configuration back."""
    config = getattr(transformer, _PLACE, None)
    if isinstance(config, _Hiding):
        setattr(transformer, _PLACE, FrozenDict(config))
