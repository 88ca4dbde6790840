"""Where tokens are moved: modules that are replaced, code of others that keeps tokens, hooks of one's own."""

from __future__ import annotations

import copy
import types

import accelerate
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from dit_accel.patterns import Clear, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def recipe_of(case, **options):
    image = hasattr(case.pipe.transformer.config, "joint_attention_dim")
    return Recipe(
        Clear(3) if image else Neighborhood((3, 3, 3)),
        **{"order": "hilbert", "block_size": (16, 16), **options},
    )


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# -- the module that gives tokens their places, replaced ---------------------------------------------------


def another_place(transformer):
    """A new module of another value for the one that gives tokens their places, under its name."""
    if hasattr(transformer, "rope"):
        rope = transformer.rope
        if hasattr(rope, "rope_dim"):
            new = type(rope)(rope.patch_size, rope.patch_size_t, rope.rope_dim, theta=99.0)
        else:
            new = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len, theta=99.0)
        return "rope", new
    old = transformer.pos_embed
    if hasattr(old, "axes_dim"):
        return "pos_embed", type(old)(theta=99, axes_dim=old.axes_dim)
    new = PatchEmbed(height=16, width=16, patch_size=2, in_channels=4, embed_dim=32, pos_embed_max_size=40)
    new.proj.load_state_dict(old.proj.state_dict())
    return "pos_embed", new


@FAMILIES
class TestReplaced:
    def test_after_enable_and_back(self, case):
        transformer, recipe = case.pipe.transformer, recipe_of(case, dense_steps=1)
        name, new = another_place(transformer)
        old = getattr(transformer, name)
        results = {}
        for which, module in (("old", old), ("new", new)):
            setattr(transformer, name, module)
            untouched = case.run(case.pipe)
            with accelerated(case.pipe, recipe):
                results[which] = untouched, case.run(case.pipe)
        assert not torch.allclose(results["old"][1], results["new"][1], atol=1e-3)
        setattr(transformer, name, old)
        enable(case.pipe, recipe)
        for which, module in (("old", old), ("new", new), ("old", old), ("new", copy.deepcopy(new))):
            setattr(transformer, name, module)
            assert torch.equal(case.run(case.pipe), results[which][1])
        disable(case.pipe)
        assert not any(m._forward_hooks for m in (old, new, *transformer.modules()))
        assert torch.equal(case.run(case.pipe), results["new"][0])

    def test_in_mid_run(self, case):
        """From the second step on, as schedules that extend the context over a run do."""
        name, new = another_place(case.pipe.transformer)

        def results(recipe):
            case.pipe.transformer = copy.deepcopy(original)

            def replace(pipe, step, timestep, inputs):
                setattr(pipe.transformer, name, copy.deepcopy(new))
                return inputs

            with accelerated(case.pipe, recipe):
                return case.run(case.pipe, callback_on_step_end=replace)

        original = case.pipe.transformer
        close(results(recipe_of(case)), results(recipe_of(case, order="raster")))

    def test_moved_and_copied(self, case):
        transformer = case.pipe.transformer
        enable(case.pipe, recipe_of(case))
        expected = case.run(case.pipe)
        transformer.to(torch.float64).to(torch.float32)
        assert torch.equal(case.run(case.pipe), expected)
        case.pipe.transformer = copy.deepcopy(transformer)
        assert torch.equal(case.run(case.pipe), expected)
        case.pipe.transformer = transformer
        assert torch.equal(case.run(case.pipe), expected)


# -- code of others that keeps tokens from step to step ----------------------------------------------------


class Keeping(nn.Module):
    """Runs blocks at even calls and gives back what they added at the odd ones: a cache of residuals."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.calls, self.kept = blocks, 0, None

    def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        return self.through(list(self.blocks), hidden_states, encoder_hidden_states, *args, **kwargs)

    def through(self, blocks, x, *args, **kwargs):
        self.calls += 1
        if self.calls % 2:
            out = x
            for block in blocks:
                out = block(out, *args, **kwargs)
            self.kept = out - x
        return x + self.kept


def blocks_in_one(transformer):
    """As first-block caches do in the length of a forward, which they replace on the instance."""
    blocks, one, original = (
        transformer.blocks,
        nn.ModuleList([Keeping(transformer.blocks)]),
        transformer.forward,
    )

    def forward(self, *args, **kwargs):
        self.blocks = one
        try:
            return original(*args, **kwargs)
        finally:
            self.blocks = blocks

    transformer.forward = types.MethodType(forward, transformer)


def one_block(transformer):
    """A block's forward replaced on the instance."""
    block, kept = transformer.blocks[1], []
    original = block.forward

    def forward(x, *args, **kwargs):
        if len(kept) % 2 == 0:
            kept.append(original(x, *args, **kwargs) - x)
        else:
            kept.append(kept[-1])
        return x + kept[-1]

    block.forward = forward


def subclass(transformer):
    """Blocks of a subclass of the user's."""

    class Mine(type(transformer.blocks[2])):
        def forward(self, x, *args, **kwargs):
            kept = self.__dict__.setdefault("kept", [])
            new = super().forward(x, *args, **kwargs) - x if len(kept) % 2 == 0 else kept[-1]
            kept.append(new)
            return x + new

    transformer.blocks[2].__class__ = Mine


def whole_class(transformer):
    """The forward of the transformer's class replaced, as TeaCache does; a class of its own for this test."""
    cls = type(transformer)
    original, blocks = cls.forward, nn.ModuleList([Keeping(transformer.blocks)])

    def forward(self, *args, **kwargs):
        kept = self.blocks
        self.blocks = blocks
        try:
            return original(self, *args, **kwargs)
        finally:
            self.blocks = kept

    transformer.__class__ = type(
        "WanTransformer3DModel", (cls,), {"forward": forward, "__module__": "teacache"}
    )


def a_hook(transformer):
    """A forward hook of the user's on a block."""
    kept = []

    def hook(module, args, output):
        kept.append(output - args[0] if len(kept) % 2 == 0 else kept[-1])
        return args[0] + kept[-1]

    transformer.blocks[0].register_forward_hook(hook)


CACHES = (blocks_in_one, one_block, subclass, whole_class, a_hook)


@pytest.mark.parametrize("dense", [0, 1, {1}, {2, -1}], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["before enable", "while enabled"])
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.__name__)
def test_caches_of_others(wan, cache, first, dense):
    """One token order at all steps, so that the order changes nothing."""
    results = {}
    for order in ("raster", "hilbert"):
        pipe = wan.make()
        if first:
            cache(pipe.transformer)
        enable(pipe, recipe_of(wan, order=order, dense_steps=dense))
        if not first:
            cache(pipe.transformer)
        results[order] = wan.run(pipe, steps=4)
    close(results["hilbert"], results["raster"])
    plain = wan.make()
    with accelerated(plain, recipe_of(wan, dense_steps=dense)):
        assert not torch.allclose(wan.run(plain, steps=4), results["raster"], atol=1e-3)


@FAMILIES
class TestDenseSteps:
    """Where it is known that nothing keeps tokens, dense steps are the model's own, bit for bit."""

    def test_of_a_stock_pipeline(self, case):
        self.check(case, lambda pipe: None)

    def test_with_weights_elsewhere(self, case):
        cpu = torch.device("cpu")
        self.check(
            case, lambda pipe: accelerate.cpu_offload_with_hook(pipe.transformer, execution_device=cpu)
        )
        self.check(case, lambda pipe: accelerate.cpu_offload(pipe.transformer, execution_device=cpu))

    def check(self, case, prepare):
        pipe = case.make()
        prepare(pipe)
        untouched = case.run(pipe, steps=1)
        for dense in (1, {0, -1}):
            with accelerated(pipe, recipe_of(case, dense_steps=dense)) as handle:
                moved = case.run(pipe)
                assert handle.token_order() is not None
                assert torch.equal(case.run(pipe, steps=1), untouched)
                assert torch.equal(case.run(pipe), moved)


# -- hooks of one's own ------------------------------------------------------------------------------------


def features(case, pipe, order):
    """Of a block in the middle, brought into raster order as the README says: visual tokens alone."""
    transformer, seen = pipe.transformer, []
    handle = enable(pipe, recipe_of(case, order=order, dense_steps=1))

    def hook(module, args, kwargs, output):
        visual = output[1] if isinstance(output, tuple) and "Flux" in type(module).__name__ else output
        visual = visual[-1] if isinstance(visual, tuple) and "SD3" in type(transformer).__name__ else visual
        visual = visual[0] if isinstance(visual, tuple) else visual
        order = handle.token_order()
        seen.append(visual if order is None else visual[:, torch.argsort(order)])

    blocks = family_of(transformer).blocks(transformer)[0]
    with blocks[1].register_forward_hook(hook, with_kwargs=True):
        case.run(pipe, steps=2)
    return torch.stack(seen), handle.token_order()


@FAMILIES
def test_token_order(case):
    actual, order = features(case, case.make(), "hilbert")
    expected, stays = features(case, case.make(), "raster")
    assert stays is None
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    assert not torch.equal(order, torch.arange(len(order)))
    close(actual, expected)
    assert not torch.allclose(actual[:, :, order], expected, atol=1e-3)


@FAMILIES
def test_hooks_of_the_transformer(case):
    """Registered before or after: they see what comes out in the model's own order."""
    pipe, seen = case.pipe, []
    inputs = case.inputs(pipe)
    note = lambda module, args, output: seen.append(output[0])  # noqa: E731
    with torch.no_grad(), pipe.transformer.register_forward_hook(note):
        enable(pipe.transformer, recipe_of(case))
        with pipe.transformer.register_forward_hook(note):
            out = pipe.transformer(**inputs)[0]
    assert all(torch.equal(output, out) for output in seen)
    assert len(seen) == 2
