"""diffusers' `enable_cache`: hooks that skip blocks or attention and carry tokens from step to step.

Caches change outputs by design, so the reference is the same cache over the same transformer under masks.
"""

import dataclasses

import diffusers
import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry

from dit_accel.errors import UnavailableError
from dit_accel.patterns import Clear
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated

RUN = {"steps": 6, "cfg": 2.0}
CACHING = ("flux", "hunyuanimage", "flux2", "wan", "hunyuan", "qwen", "ltx", "cogvideox", "mochi")
CACHING += ("kandinsky5",)
WITHOUT_CONTEXTS = (*CACHING, "chroma")  # whose pipeline does not tell caches its branches


def cache(config):
    """Enables the cache that `config` makes for a pipeline."""
    return lambda pipe: pipe.transformer.enable_cache(config(pipe))


def works(case, enable_cache, **run):
    """At sparse and dense steps: a pattern that covers all makes the two differ in token order only."""
    case.pattern = Clear(20)
    case.recipe = dataclasses.replace(case.recipe, attention=case.pattern, dense_steps={0, 3})
    run = {**RUN, **run}
    expected = case.run(case.untouched(enable_cache), **run)
    assert not torch.allclose(expected, case.run(case.untouched(), **run))
    for enabled_first in (False, True):
        pipe = case.make()
        if not enabled_first:
            enable_cache(pipe)
        with accelerated(pipe, case.recipe):
            if enabled_first:
                enable_cache(pipe)
            case.close(case.run(pipe, **run), expected)
        assert torch.equal(case.run(pipe, **run), expected)


@pytest.mark.feature("FirstBlockCache")
def test_first_block_cache(case, cell):
    if case.family in ("sd3", "zimage", "far"):
        assert not hasattr(case.make().transformer, "enable_cache")
        cell.no_such_thing("no `enable_cache` in diffusers")
        return
    first_block = cache(lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.5))
    transformer = case.make().transformer
    TransformerBlockRegistry._register()
    block = type(family_of(transformer).blocks(transformer)[0][0])
    if block not in TransformerBlockRegistry._registry:
        with pytest.raises(ValueError, match=rf"{block.__name__}.* not registered"):
            case.untouched(first_block)
        cell.no_such_thing("its blocks are not registered in diffusers")
        return
    fails = {
        "flux2": (TypeError, "unsupported operand type"),
        "kandinsky5": (ValueError, "'hidden_states' not"),
    }
    if case.family in fails:
        error, match = fails[case.family]
        with pytest.raises(error, match=match):
            case.run(case.untouched(first_block), **RUN)
        cell.no_such_thing("diffusers' hook fails on its blocks")
        return
    works(case, first_block)


@pytest.mark.feature("PyramidAttentionBroadcast", families=WITHOUT_CONTEXTS)
def test_pyramid_attention_broadcast(case):
    works(
        case,
        cache(
            lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 950),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        ),
        cfg=1.0,
    )


@pytest.mark.feature("TaylorSeer", families=CACHING)
def test_taylorseer(case):
    layers = [
        r"(single_)?(transformer_)?blocks\.\d+\.attn1?",
        r"visual_transformer_blocks\.\d+\.self_attention",
    ]
    works(
        case,
        cache(
            lambda pipe: diffusers.TaylorSeerCacheConfig(
                cache_interval=2,
                disable_cache_before_step=2,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=layers,
            )
        ),
    )


@pytest.mark.feature("MagCache", families=CACHING)
def test_mag_cache(case):
    works(
        case,
        cache(
            lambda pipe: diffusers.MagCacheConfig(
                threshold=0.5, num_inference_steps=6, mag_ratios=[1.0, 0.9, 1.0, 1.0, 0.9, 1.0]
            )
        ),
    )


def reads_places(case, cell, config, name, cfg=2.0):
    """Refused where tokens are reordered; in raster order it works."""
    pipe, cached = case.make(), cache(config)
    cached(pipe)
    refused = cell.refused(
        UnavailableError, rf"{name} reads the place .* order=\"raster\"", 'works with `order="raster"`'
    )
    with accelerated(pipe, case.recipe), refused:
        case.run(pipe, steps=2)
    run = {"steps": 6, "cfg": cfg}
    expected = case.run(case.untouched(cached), **run)
    with accelerated(pipe, Recipe(Clear(20), order="raster")):
        case.close(case.run(pipe, **run), expected)


@pytest.mark.feature("FasterCache", families=WITHOUT_CONTEXTS)
def test_faster_cache(case, cell):
    def config(pipe):
        return diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            is_guidance_distilled=True,
            current_timestep_callback=lambda: pipe.current_timestep,
            tensor_format="BCFHW",
        )

    if case.family == "mochi":
        with pytest.raises(TypeError, match="not subscriptable"):  # it skips before it has kept anything
            case.run(case.untouched(cache(config)), steps=6)
        cell.no_such_thing("diffusers' needs timesteps that fall")
        return
    reads_places(case, cell, config, "FasterCache", cfg=1.0)  # it does not tell branches apart


@pytest.mark.feature("SeaCache", families=("wan", "hunyuan"))
def test_sea_cache(case, cell):
    def config(pipe):
        return diffusers.SeaCacheConfig(
            raw_vision_callback=lambda module, args, kwargs: list(kwargs["hidden_states"])
        )

    reads_places(case, cell, config, "SeaCache")
