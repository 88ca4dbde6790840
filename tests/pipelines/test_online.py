"""A pattern that each call chooses by content, in all families, against diffusers' own attention.

The reference chooses in the same way from its own queries and keys, in the model's token order.
"""

import math
from unittest import mock

import pytest
import torch
from online_pattern import TopBlocks
from torch.nn import functional as F

from dit_accel import TokenLayout
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.attention.perturbed import Perturbed
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable, handle_of
from dit_accel.summary import summary

TOP, SIZE = TopBlocks(0.4), (16, 16)
FAMILIES = ("flux", "sd3", "wan", "hunyuan", "hunyuan15")


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def near(family: str):
    return Clear(3) if family in ("flux", "sd3") else Neighborhood((3, 3, 3))


class ChoosingProcessor:
    """diffusers' own processor, whose attention is under masks that its queries and keys choose."""

    def __init__(self, original, grid, text_first, heads):
        self.original, self.grid, self.text_first, self.heads = original, grid, text_first, heads

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        attend, original = F.scaled_dot_product_attention, self.original

        def choosing(query, key, value, attn_mask=None, **options):
            text_len = query.shape[2] - math.prod(self.grid)
            layout = TokenLayout(self.grid, text_len, self.text_first)
            chosen = TOP.select(query, key, layout, block_size=SIZE).to_token_mask()
            own = [chosen[:, h] if p == TOP else p.token_mask(layout) for h, p in enumerate(self.heads)]
            mask = torch.stack([m.expand(chosen[:, 0].shape) for m in own], 1)
            mask = mask if attn_mask is None else mask & attn_mask
            return attend(query, key, value, attn_mask=mask, **options)

        with mock.patch.object(F, "scaled_dot_product_attention", choosing):
            if "Joint" in type(original).__name__:
                return original(attn, hidden_states, encoder_hidden_states)
            return original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def recipes(family: str) -> dict:
    """The recipe, and the patterns of the two heads of each layer."""
    static = near(family)
    return {
        "everywhere": (Recipe(TOP, block_size=SIZE), lambda layer: (TOP, TOP)),
        "beside-reordered-layers": (
            Recipe({"all": static, "1": TOP}, order="hilbert", block_size=SIZE),
            lambda layer: (TOP, TOP) if layer == 1 else (static, static),
        ),
        "beside-static-heads": (
            Recipe({"all": static, "heads.1": TOP}, order="hilbert", block_size=SIZE),
            lambda layer: (static, TOP),
        ),
    }


@pytest.mark.parametrize("name", ["everywhere", "beside-reordered-layers", "beside-static-heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_diffusers_under_what_was_chosen(case, family, name):
    """With guidance and two samples, in text-first and text-last order, with padded text."""
    (recipe, heads_of), run = recipes(family)[name], {"batch": 2, "cfg": 3.0, "steps": 2}
    dense, ref = case.run(case.pipe, **run), case.make()
    grid = (1, 8, 12) if family in ("flux", "sd3") else (3, 6, 8)
    for index, module in enumerate(family_of(ref.transformer).layers(ref.transformer).values()):
        module.set_processor(ChoosingProcessor(module.processor, grid, family == "flux", heads_of(index)))
    expected = case.run(ref, **run)
    with accelerated(case.pipe, recipe) as handle:
        actual = case.run(case.pipe, **run)
        moved = handle.token_order() is not None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert moved == (name != "everywhere")
    assert not torch.allclose(expected, dense, atol=1e-2)
    assert torch.equal(case.run(case.pipe, **run), dense)


@pytest.mark.parametrize("family", ["wan"])
class TestRuns:
    def test_dense_steps(self, case):
        dense = case.run(case.pipe, steps=1)
        with accelerated(case.pipe, Recipe(TOP, block_size=SIZE, dense_steps=1)) as handle:
            torch.testing.assert_close(case.run(case.pipe, steps=1), dense)
            assert handle.run_density == 1
            case.run(case.pipe, steps=2)
            assert handle.run_density == pytest.approx((1 + 1 / 3) / 2)  # of 9 blocks 3

    def test_summary_says_what_was_computed(self, case):
        """Not what the pattern aims at: 3 of 9 blocks, in `blocks.1` of one head."""
        enable(case.pipe, Recipe({"0": TOP, "1/heads.0": TOP, "1/heads.1": near("wan")}, block_size=SIZE))
        assert "chosen" not in str(summary(case.pipe))
        case.run(case.pipe, steps=2, cfg=3.0)
        rows = {row["layer"]: row for row in summary(case.pipe).rows}
        one, near_density = rows["blocks.0"], near("wan").density(TokenLayout((3, 6, 8)))
        assert one["density"] == one["block_density"] == pytest.approx(1 / 3)
        assert one["density_by_step"] == pytest.approx({0: 1 / 3, 1: 1 / 3})
        assert one["note"] == "chosen by content: 0.333 to 0.333 in 2 steps, aims at 0.400"
        assert rows["blocks.1"]["density"] == pytest.approx((1 / 3 + near_density) / 2)
        assert rows["blocks.2"]["density_by_step"] == {}
        density = (rows["blocks.0"]["density"] + rows["blocks.1"]["density"] + 1) / 3
        assert handle_of(case.pipe).run_density == pytest.approx(density)

    def test_guidance(self, case):
        """The perturbed branch chooses by its own queries and keys."""
        guidance = HeadPerturbation({(1, 1): 1.0, (2, 0): 0.5}, scale=2.5)
        transformer, inputs = case.pipe.transformer, case.inputs(case.make())
        recipe = Recipe(TOP, block_size=SIZE)
        with torch.no_grad():
            enable(transformer, recipe)
            cond = transformer(**inputs)[0]
            with guidance.applied(transformer):
                perturbed = transformer(**inputs)[0]
            enable(transformer, Recipe(TOP, block_size=SIZE, guidance=guidance))
            actual = transformer(**inputs)[0]
        torch.testing.assert_close(actual, cond + 2.5 * (cond - perturbed), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(actual, cond, atol=1e-3)

    def test_compiled_block(self, case):
        with accelerated(case.pipe, Recipe(TOP, block_size=SIZE)):
            expected = case.run(case.pipe, steps=1)
            for block in case.pipe.transformer.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
            actual = case.run(case.pipe, steps=1)
        torch.compiler.reset()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["soft_pag", "seg", "temperature"])
@pytest.mark.parametrize("heads", [(TOP, TOP), (Clear(2), TOP)], ids=["all", "some"])
def test_perturbed_heads_keep_what_the_others_chose(monkeypatch, kind, heads):
    """One choice a call, though queries or scale of the perturbed heads are others."""
    layout, choices, select = TokenLayout((3, 4, 6), 7), [], TopBlocks.select
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, layout.seq_len, 8, generator=generator, dtype=torch.float64)
    inner = layer_attention(heads, LayerMasks(layout, "raster", SIZE, torch.device("cpu")))
    call = AttentionCall(q, k, v, layout, dense=None)
    fixed, out = inner.resolved(call), inner(call)
    options = {"temperature": 2.0} if kind == "temperature" else {}
    perturbation = HeadPerturbation([(0, 1)], kind=kind, **options)
    strengths = torch.tensor([0.5], dtype=torch.float64)
    expected = Perturbed(fixed, perturbation, [1], strengths)(call)
    monkeypatch.setattr(TopBlocks, "select", lambda *a, **kw: choices.append(1) or select(*a, **kw))
    actual = Perturbed(inner, perturbation, [1], strengths)(call)
    assert choices == [1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert torch.equal(actual[:, 0], out[:, 0])
    assert not torch.allclose(actual[:, 1], out[:, 1], atol=1e-3)
