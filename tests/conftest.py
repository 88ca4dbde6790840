"""Fixtures: tiny pipelines of the real diffusers classes with random weights, and ways to run them."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from masked_processors import MASKED, MaskedProcessor
from tiny_families import FAMILIES, transformer_inputs

pytest.register_assert_rewrite("mask_oracle")

# A failing test is the change's doing, not luck's; `make fuzz` looks for new examples.
# Neither does it fail for being slow: on a machine that does much else milliseconds become seconds.
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **SLOW)
settings.register_profile("random", print_blob=True, **SLOW)
settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """Files with most to do first: processes that take one after another then end at about the same time."""
    work = Counter()
    for item in items:
        work[item.path] += 1 if item.get_closest_marker("slow") is None else 40
    items.sort(key=lambda item: -work[item.path])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _attention_backend_of_diffusers():
    """`set_attention_backend` of any model is the default of all others from then on: not beyond its test."""
    yield
    if module := sys.modules.get("diffusers.models.attention_dispatch"):
        module._AttentionBackendRegistry.set_active_backend(
            module.AttentionBackendName(module.DIFFUSERS_ATTN_BACKEND)
        )


@pytest.fixture(scope="session")
def families() -> dict[str, SimpleNamespace]:
    """By family, how to `make` and `run` a pipeline, and the `inputs` that it passes to its transformer."""
    return {
        name: SimpleNamespace(make=make, run=run, inputs=partial(transformer_inputs, run=run))
        for name, (make, run) in FAMILIES.items()
    }


def _with_pipeline(family: str):
    """A fixture named as the family: its tools of `families`, and a `pipe` that is made for the test."""

    @pytest.fixture(name=family)
    def made(families):
        return SimpleNamespace(**vars(families[family]), pipe=families[family].make())

    return made


globals().update({family: _with_pipeline(family) for family in FAMILIES})


@pytest.fixture(scope="session")
def masked():
    """Puts token masks (S, S) or (heads, S, S), given by layer, under a transformer's processors."""

    from dit_accel.pipelines.families.processors import install

    def apply(modules: dict, masks: dict[str, torch.Tensor]) -> None:
        for name, mask in masks.items():
            original = modules[name].processor
            kind = MASKED.get(type(original).__name__, MaskedProcessor)
            install(modules[name], kind(original, mask[None] if mask.ndim == 3 else mask))

    return apply
