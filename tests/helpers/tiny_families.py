"""By family, how a tiny pipeline is made and run; and what it passes to its transformer."""

from __future__ import annotations

import inspect

import image_pipelines
import video_pipelines
import wan_pipelines

FAMILIES = {**image_pipelines.PIPELINES, **wan_pipelines.PIPELINES, **video_pipelines.PIPELINES}


def by_name(module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a module's forward by their names."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def transformer_inputs(pipe, run) -> dict:
    """The keyword arguments that a pipeline passes to its transformer, from a run of one step."""
    seen: dict = {}
    note = lambda module, args, kwargs: seen.update(by_name(module, args, kwargs))  # noqa: E731
    with pipe.transformer.register_forward_pre_hook(note, with_kwargs=True, prepend=True):
        run(pipe, steps=1)
    return seen
