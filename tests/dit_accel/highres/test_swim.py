"""FreeSwim on whole transformers: exactness, which calls hold which branch, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import dit_accel
from dit_accel import Recipe, TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.highres import Swim
from dit_accel.patterns import Clear, InwardWindow

FAMILIES = ("wan", "flux", "sd3", "hunyuan")
SMALL = Swim((1, 2))


@pytest.fixture(params=FAMILIES)
def family(request, families):
    return SimpleNamespace(**vars(families[request.param]), name=request.param)


@pytest.mark.parametrize("cache_steps", [None, 1])
def test_windows_over_everything_change_nothing(family, cache_steps):
    pipe = family.make()
    direct = family.run(pipe, batch=2, cfg=3.0)
    with Swim((20, 20), cache_steps, scale_log_base=None).applied(pipe):
        assert torch.allclose(family.run(pipe, batch=2, cfg=3.0), direct, atol=5e-6)
    with Swim((20, 20), cache_steps).applied(pipe):
        assert not torch.allclose(family.run(pipe, batch=2, cfg=3.0), direct, atol=1e-4)
    assert torch.equal(family.run(pipe, batch=2, cfg=3.0), direct)
    assert dit_accel.handle_of(pipe) is None


def test_samples_are_paired(family):
    """A batch is its samples, one by one."""
    pipe = family.make()
    with torch.no_grad(), SMALL.applied(pipe.transformer):
        inputs = {k: v for k, v in family.inputs(pipe).items() if k != "return_dict"}
        batch = {
            name: torch.cat([value, value * (0.9 if name == "hidden_states" else 1)])
            if isinstance(value, torch.Tensor) and len(value) == 1
            else value
            for name, value in inputs.items()
        }
        alone = [
            {k: v[i : i + 1] if isinstance(v, torch.Tensor) and len(v) == 2 else v for k, v in batch.items()}
            for i in range(2)
        ]
        together = pipe.transformer(**batch).sample
        for i, one in enumerate(alone):
            assert torch.allclose(pipe.transformer(**one).sample, together[i : i + 1], atol=2e-6)


class Masked:
    """A processor of Wan's whose first half of the batch attends under a mask, at another scale."""

    def __init__(self, original, mask, factor):
        self.original, self.mask, self.factor = original, mask, factor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mask = torch.ones(len(hidden_states), 1, *self.mask.shape, dtype=torch.bool)
        mask[: len(mask) // 2] = self.mask
        scaled = attn.norm_q.weight.data.clone()
        attn.norm_q.weight.data *= self.factor
        try:
            return self.original(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)
        finally:
            attn.norm_q.weight.data = scaled


def test_wan_is_the_published_dual_path(wan, families):
    """Against a doubled batch with masks, and cross-attention by hooks, in the model's own order."""
    inputs = {k: v for k, v in wan.inputs(wan.pipe).items() if k != "return_dict"}
    transformer = wan.pipe.transformer
    with torch.no_grad(), SMALL.applied(transformer):
        ours = transformer(**inputs).sample
    grid = (3, 6, 8)
    mask = InwardWindow((1, 2)).token_mask(TokenLayout(grid))
    factor = (torch.tensor(3120.0, dtype=torch.float64).log() / torch.tensor(1560.0).double().log()).sqrt()
    for block in transformer.blocks:
        block.attn1.set_processor(Masked(block.attn1.processor, mask, float(factor)))
        block.attn2.register_forward_hook(lambda module, args, out: torch.cat([out[1:], out[1:]]))
    doubled = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        oracle = transformer(**doubled).sample
    assert not torch.allclose(oracle[:1], oracle[1:], atol=1e-3)
    assert torch.allclose(ours, oracle[:1], atol=2e-6)


def sizes_of_calls(family, swim, steps, **options):
    """How many rows each call of the transformer ran."""
    pipe, seen = family.make(), []
    with swim.applied(pipe):
        first = next(iter(dit_accel.handle_of(pipe).bindings.values())).family.blocks(pipe.transformer)[0][0]
        count = lambda module, args, kwargs: seen.append(len((*args, *kwargs.values())[0]))  # noqa: E731
        with first.register_forward_pre_hook(count, with_kwargs=True):
            family.run(pipe, steps=steps, **options)
    return seen


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan"])
def test_guided_calls(name, families):
    family = families[name]
    every, cached = Swim((1, 1)), Swim((1, 1), cache_steps=2)
    assert sizes_of_calls(family, every, 4, cfg=3.0, batch=2) == [4] * 8
    assert sizes_of_calls(family, cached, 5, cfg=3.0, batch=2) == [4, 2, 2, 2, 4, 2, 2, 2, 4, 2]
    assert sizes_of_calls(family, cached, 3) == [2, 1, 2]


def test_guided_calls_of_a_batch_with_both_branches(families):
    assert sizes_of_calls(families["sd3"], Swim((1, 1)), 2, cfg=3.0, batch=2) == [8, 8]
    assert sizes_of_calls(families["sd3"], Swim((1, 1), 2), 3, cfg=3.0, batch=2) == [6, 4, 6]


def test_cache_contexts_of_a_bare_transformer(wan):
    transformer, inputs = wan.pipe.transformer, wan.inputs(wan.pipe)
    inputs = {k: v for k, v in inputs.items() if k != "return_dict"}
    seen = []
    count = lambda module, args: seen.append(len(args[0]))  # noqa: E731
    hook = transformer.blocks[0].register_forward_pre_hook(count)
    with torch.no_grad(), hook, Swim((1, 1), 2).applied(transformer):
        for timestep in (900.0, 800.0, 700.0):
            inputs["timestep"] = torch.tensor([timestep])
            for name in ("cond", "uncond"):
                with transformer.cache_context(name):
                    transformer(**inputs)
    assert seen == [2, 1, 1, 1, 2, 1]
    assert "cache_context" not in vars(transformer)


def test_the_first_executed_step_guides_wherever_it_is(wan):
    pipe, seen = wan.pipe, []
    count = lambda module, args: seen.append(len(args[0]))  # noqa: E731
    latents = wan.inputs(pipe)["hidden_states"]
    timesteps = torch.tensor([900.0, 800.0, 700.0])
    inputs = {k: v for k, v in wan.inputs(pipe).items() if k != "return_dict"}
    with (
        torch.no_grad(),
        Swim((1, 1), 2).applied(pipe),
        pipe.transformer.blocks[0].register_forward_pre_hook(count),
    ):
        for run in range(2):  # of one step, then of three
            for timestep in timesteps[: 1 + 2 * run]:
                inputs |= {"timestep": timestep[None], "hidden_states": latents}
                pipe.transformer(**inputs)
    assert seen == [2, 2, 1, 2]


# -- with other things ---------------------------------------------------------------------------------------


def test_the_full_branch_follows_the_recipe(family):
    pipe = family.make()
    with SMALL.applied(pipe):
        dense = family.run(pipe)
    dit_accel.enable(pipe, Recipe(Clear(2)))
    with SMALL.applied(pipe):
        sparse = family.run(pipe)
    assert not torch.allclose(sparse, dense, atol=1e-5)
    assert dit_accel.handle_of(pipe).recipe == Recipe(Clear(2))
    dit_accel.enable(pipe, Recipe(Clear(2), dense_steps=10))
    with SMALL.applied(pipe):
        assert torch.allclose(family.run(pipe), dense, atol=2e-6)
    dit_accel.enable(pipe, Recipe(Clear(2), dense_layers={0}))
    with SMALL.applied(pipe):
        assert not torch.equal(family.run(pipe), sparse)


def test_a_tail_lets_windows_see_farther(wan):
    with SMALL.applied(wan.pipe):
        windows = wan.run(wan.pipe)
    dit_accel.enable(wan.pipe, Recipe(Clear(99), tail="pooled", block_size=(16, 16)))
    with SMALL.applied(wan.pipe):
        assert not torch.allclose(wan.run(wan.pipe), windows, atol=1e-5)


def test_guidance_is_refused(wan):
    heads = HeadPerturbation(heads=[(0, 0)])
    dit_accel.enable(wan.pipe, Recipe(Clear(2), guidance=heads))
    with pytest.raises(UnavailableError, match="guidance=None"), SMALL.applied(wan.pipe):
        pass
    assert dit_accel.handle_of(wan.pipe).recipe.guidance == heads


def test_step_caches(wan):
    from diffusers import FirstBlockCacheConfig

    wan.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    with SMALL.applied(wan.pipe):
        cached = wan.run(wan.pipe, cfg=3.0)
    with (
        Swim((1, 2), cache_steps=2).applied(wan.pipe),
        pytest.raises(UnavailableError, match="disable_cache"),
    ):
        wan.run(wan.pipe, cfg=3.0)
    wan.pipe.transformer.disable_cache()
    with SMALL.applied(wan.pipe):
        assert torch.allclose(wan.run(wan.pipe, cfg=3.0), cached, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"half_window": (1, -1)}, "`half_window` must be 2 integers"),
        ({"half_window": (1, 1), "cache_steps": 0}, "`cache_steps` must be a positive integer, got 0"),
        ({"half_window": (1, 1), "scale_log_base": 1}, "`scale_log_base` must be a number above 1 or None"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Swim(**arguments)


def test_published_scale():
    assert F.l1_loss(torch.tensor(Swim((1, 1)).scale), torch.tensor(1.0461)) < 5e-5
