"""What a calibration says reaches the heads: each step, head and tail, against the formula in float64."""

import calibrations
import pytest
import torch
from attention_cases import plain

import dit_accel
from dit_accel import Recipe, TokenLayout
from dit_accel.attention.head_masked import HeadMasked
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.kernels import block_sparse_attention
from dit_accel.patterns import Calibrated, Clear, Dense
from dit_accel.patterns.head_choice import HeadChoice

GRID = (4, 6, 8)
LAYOUTS = {
    "no-text": TokenLayout(GRID),
    "text-last": TokenLayout(GRID, 7),
    "text-first": TokenLayout(GRID, 7, text_first=True),
}
WITHOUT_TAILS = calibrations.drawn(GRID, tails=False)


def tensors(layout, heads=4, batch=2):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, layout.seq_len, heads, 16)
    made = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.float().transpose(1, 2) for x in made]


def within(actual, approximate, exact):
    allowance = 2 * (approximate - exact).abs().max() + torch.finfo(actual.dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= allowance


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("step", range(4))
def test_every_head_and_step_is_exact(layout, step):
    """Rows 0 and 1 are two steps each; padded text stays hidden."""
    qkv = tensors(layout)
    valid = torch.tensor([7, 3]) if layout.text_len else None
    pattern = Calibrated(WITHOUT_TAILS, layer="blocks.1")
    choices = [WITHOUT_TAILS.choices(1, head)[step // 2] for head in range(4)]
    allowed = torch.stack([choice.token_mask(layout) for choice in choices]).expand(2, -1, -1, -1)
    if valid is not None:
        allowed = allowed & ~layout.padding(valid)[:, None, None]
    exact = [x.double() for x in qkv]
    expected = plain(*exact, allowed, 0.25)
    options = {"step": step, "text_valid": valid, "backend": "gather"}
    within(dit_accel.attention(*qkv, pattern, layout, **options), plain(*qkv, allowed, 0.25), expected)
    out, lse = dit_accel.attention(*qkv, pattern, layout, return_lse=True, **options)
    within(out, plain(*qkv, allowed, 0.25), expected)
    scores = (exact[0] @ exact[1].mT * 0.25).masked_fill(~allowed, -torch.inf).logsumexp(-1)
    assert (lse - scores).abs().max() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_heads_with_a_tail_pool_and_others_do_not(layout):
    """Each like a kernel call on its own mask in its own order."""
    calibration, qkv = calibrations.drawn(GRID, seed=1), tensors(layout)
    tails = calibration.tail[0, 0]
    assert tails.any()
    assert not tails.all()
    masks = LayerMasks(layout, "auto", (16, 16), torch.device("cpu"))
    layer = layer_attention([calibration.choices(0, head)[0] for head in range(4)], masks)
    assert isinstance(layer, HeadMasked)
    assert len(layer.parts) == 2
    call = dit_accel.attention.__globals__["AttentionCall"](*qkv, layout, dense=lambda call: call.q)
    out, lse = layer.with_lse(call)
    assert torch.equal(layer(call), out)
    for head in range(4):
        choice = calibration.choices(0, head)[0]
        mask = choice.own_mask(masks)
        order = torch.arange(layout.seq_len) if mask.order is None else mask.order
        one = [x[:, head : head + 1, order] for x in qkv]
        tail = "pooled" if tails[head] else None
        expected, own = block_sparse_attention(*one, mask, tail=tail, return_lse=True)
        back = torch.argsort(order)
        assert torch.allclose(out[:, head], expected[:, 0, back], atol=1e-6)
        assert torch.allclose(lse[:, head], own[:, 0, back], atol=1e-5)


def test_density_is_the_mean_over_layers_heads_and_steps():
    layout = LAYOUTS["text-last"]
    found = [
        WITHOUT_TAILS.choices(layer, head)[row].token_mask(layout).double().mean()
        for layer in range(2)
        for head in range(4)
        for row in range(2)
    ]
    assert Calibrated(WITHOUT_TAILS).density(layout) == pytest.approx(float(sum(found) / 16), abs=1e-12)


def test_layer_density_is_that_of_its_heads():
    layout = TokenLayout(GRID)
    masks = LayerMasks(layout, "auto", (16, 16), torch.device("cpu"))
    choices = [WITHOUT_TAILS.choices(0, head)[1] for head in range(4)]
    layer = layer_attention(choices, masks)
    exact = sum(choice.token_mask(layout).double().mean() for choice in choices) / 4
    assert layer.density == pytest.approx(float(exact), abs=1e-12)
    assert layer.mask.num_groups == len({choice.pattern for choice in choices})
    mixed = layer_attention([Clear(2), *choices[1:]], masks)  # with a head of another selector
    assert isinstance(mixed, HeadMasked)


def test_rows_of_steps():
    calibration = calibrations.drawn(GRID, rows=2, steps=10)
    assert [calibration.row(step) for step in range(10)] == [0] * 5 + [1] * 5
    assert [calibration.row(step, 4, rescale=True) for step in range(4)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="made for runs of 10 steps, and this one has 4"):
        calibration.row(0, 4)
    with pytest.raises(ValueError, match="step 10 is beyond the 10 steps"):
        calibration.row(10)
    assert calibration.row_shares == [0.5, 0.5]


def test_other_models_grids_and_layers_are_refused():
    pattern = Calibrated(WITHOUT_TAILS)
    with pytest.raises(ValueError, match="made for the family 'wan', and this is a model of 'flux'"):
        pattern.check_model("flux", ("blocks.0", "blocks.1"), 4, 16)
    with pytest.raises(ValueError, match="2 layers of 4 heads of 16, and this has 3 layers of 4 heads of 16"):
        pattern.check_model("wan", ("blocks.0", "blocks.1", "blocks.2"), 4, 16)
    pattern.check_model("wan", ("blocks.0", "blocks.1"), 4, 16)
    with pytest.raises(ValueError, match=r"no layer 'blocks.7'; it has blocks.0 to blocks.1"):
        Calibrated(WITHOUT_TAILS, layer="blocks.7")
    with pytest.raises(ValueError, match=r"name it, as in Calibrated\(calibration, layer='blocks.0'\)"):
        pattern.for_head(None, 0)
    with pytest.raises(ValueError, match=r"made for grid \(4, 6, 8\), got \(4, 6, 9\)"):
        pattern.for_head("blocks.0", 0).rule(TokenLayout((4, 6, 9)))
    rescaled = Calibrated(WITHOUT_TAILS, rescale=True)
    for head in range(4):
        mask = rescaled.for_head("blocks.0", head).token_mask(TokenLayout((4, 6, 9)))
        assert mask.diagonal().all()


def test_a_tail_of_the_recipe_beside_those_of_the_calibration_is_refused():
    with_tails = calibrations.drawn(GRID, seed=1)
    qkv, layout = tensors(TokenLayout(GRID)), TokenLayout(GRID)
    with pytest.raises(ValueError, match="says itself which heads have a tail"):
        dit_accel.attention(*qkv, Calibrated(with_tails, layer="blocks.0"), layout, tail="pooled")
    pooled = Calibrated(WITHOUT_TAILS, layer="blocks.0")
    exact = dit_accel.attention(*qkv, Dense(), layout)
    errors = [
        (dit_accel.attention(*qkv, pooled, layout, tail=tail) - exact).square().mean()
        for tail in (None, "pooled")
    ]
    assert errors[1] != errors[0]


def test_in_recipes(tmp_path):
    """By the path of its file, relative to the recipe's; equal if the contents are."""
    recipe = Recipe(Calibrated(WITHOUT_TAILS, rescale=True))
    other = calibrations.drawn(GRID, tails=False)
    assert recipe == Recipe(Calibrated(other, rescale=True))
    assert recipe.tag.startswith(f"calibrated-{other.digest}")
    with pytest.raises(ValueError, match="has no file that a recipe could name; call its `save` first"):
        recipe.to_yaml()
    other.save(tmp_path / "found.safetensors")
    (tmp_path / "recipe.yaml").write_text(
        "attention: {pattern: Calibrated, calibration: found.safetensors, rescale: true}\n"
    )
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    assert loaded == recipe
    assert Recipe.from_yaml(loaded.to_yaml()) == recipe
    assert Calibrated(tmp_path / "found.safetensors") == Calibrated(other)
    (tmp_path / "recipe.yaml").write_text("attention: {pattern: Calibrated, calibration: gone.safetensors}\n")
    with pytest.raises(ValueError, match=r"no calibration file at .*gone"):
        Recipe.load(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="must be a Calibration or the path of its file, got 3"):
        Calibrated(3)


def test_a_choice_is_its_pattern():
    layout = TokenLayout(GRID)
    assert torch.equal(HeadChoice(Clear(2), True).token_mask(layout), Clear(2).token_mask(layout))
    assert not HeadChoice(Dense()).sparse
