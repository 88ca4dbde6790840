"""The methods of tiles, anchor and compressed keys, against formulas and against the model itself."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel import Recipe, TokenLayout
from dit_accel.attention.call import AttentionCall, ModelAttention
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.highres import Anchor, Compressed, Regional, Upscaled, generate, screening
from dit_accel.highres.anchor import _spread, _WithAnchor
from dit_accel.highres.low_pass import haar
from dit_accel.highres.method import Before
from dit_accel.highres.schedule import Part
from dit_accel.highres.stand_in import standing_in
from dit_accel.highres.tiles import InTiles, boxes_within, text_of, tiles_of, tokens_within
from dit_accel.kernels import block_sparse_attention
from dit_accel.patterns import Clear, Dense
from dit_accel.pipelines import family_of, load

PROMPT = "a red circle at the top left on a striped background"
OTHER = "a blue square at the bottom right on a plain background"


@pytest.fixture(scope="module")
def tiny_flux():
    pipe = load("tiny-flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["wan", "flux", "sd3", "hunyuan"])
def family(request, families):
    tools = families[request.param]
    return SimpleNamespace(**vars(tools), pipe=tools.make(), name=request.param)


def picture(pipe, method, prompt=PROMPT, **options):
    options = {"width": 96, "height": 80, "num_inference_steps": 2, "strength": 0.5, **options}
    seed = torch.Generator().manual_seed(0)
    return generate(
        pipe, prompt, method=method, generator=seed, max_sequence_length=24, output_type="np", **options
    ).images


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- compressed ----------------------------------------------------------------------------------------------


def test_one_window_is_the_model(family):
    plain = family.run(family.pipe)
    with Compressed((99, 99)).applied(family.pipe):
        assert torch.allclose(family.run(family.pipe), plain, atol=5e-6)
    with Compressed((2, 3)).applied(family.pipe):
        assert not torch.allclose(family.run(family.pipe), plain, atol=1e-5)
        patterns = [str(p) for p in dit_accel.handle_of(family.pipe).recipe.patterns]
    assert len(set(patterns)) == 2  # windows move by half from layer to layer


@pytest.mark.parametrize("layer", [0, 1])
def test_keys_outside_of_windows_by_their_means(layer):
    layout, pattern = TokenLayout((1, 16, 16)), Compressed((8, 8)).pattern(layer)
    q, k, v = (randn(1, 2, 256, 16, seed=i) for i in range(3))
    (order,) = pattern.natural_orders(layout)  # window by window
    mask = pattern.block_mask(layout, (64, 64), order)
    out = torch.empty_like(q)
    given = (x[:, :, order] for x in (q, k, v))
    out[:, :, order] = block_sparse_attention(*given, mask, tail="pooled", backend="reference")
    place = (torch.arange(16) + 4 * layer) % 16 // 8
    window = (place[:, None] * 2 + place).flatten()
    means = [torch.stack([x[:, :, window == w].mean(2) for w in range(4)], 2) for x in (k, v)]
    for row in (0, 7, 100, 255):
        own, others = window == window[row], torch.arange(4) != window[row]
        keys, values = (
            torch.cat([x[:, :, own], m[:, :, others]], 2) for x, m in zip((k, v), means, strict=True)
        )
        scores = (keys @ q[:, :, row, :, None])[..., 0] / 4
        scores[..., 64:] += math.log(64)
        wanted = (scores.softmax(-1)[..., None] * values).sum(2)
        assert torch.allclose(out[:, :, row], wanted, atol=1e-9)


# -- anchor --------------------------------------------------------------------------------------------------


def test_anchor_is_a_second_picture_of_the_same_frame(flux, masked):
    """Against the model's own processors under a mask, with the tokens put together by hand."""
    pipe, method = flux.pipe, Anchor((3, 4))
    inputs = {name: x for name, x in flux.inputs(pipe).items() if name != "return_dict"}
    image, ids, text = inputs["hidden_states"], inputs["img_ids"], inputs["encoder_hidden_states"].shape[1]
    reference, noise = (randn(1, 24, image.shape[-1], seed=i).float() for i in (1, 2))
    with torch.no_grad(), method.applied(pipe):
        hook = pipe.transformer.pos_embed.register_forward_pre_hook(_spread([2.0, 2.0]))
        with hook, standing_in(pipe, lambda part: _WithAnchor(part, reference, noise, (1, 4, 6))):
            (ours,) = pipe.transformer(**inputs, return_dict=False)
    level = float(inputs["timestep"])
    places = torch.cartesian_prod(torch.tensor([0.0]), 2.0 * torch.arange(4), 2.0 * torch.arange(6))
    layout = TokenLayout((1, 8, 12), text_len=text, text_first=True, anchor=(1, 4, 6))
    layers = family_of(pipe.transformer).layers(pipe.transformer)
    masked(layers, dict.fromkeys(layers, method.pattern().token_mask(layout)))
    anchor = level * noise + (1 - level) * reference
    inputs |= {"hidden_states": torch.cat([image, anchor], 1), "img_ids": torch.cat([ids, places])}
    with torch.no_grad():
        wanted = pipe.transformer(**inputs, return_dict=False)[0][:, : image.shape[1]]
    assert torch.allclose(ours, wanted, atol=1e-5)


def test_anchor_of_other_families_is_refused(sd3):
    with pytest.raises(UnavailableError, match='for which sd3 has no place; use "swim"'):
        generate(sd3.pipe, PROMPT, width=192, height=192, native=(64, 64), method="anchor")


# -- regional ------------------------------------------------------------------------------------------------


def test_tiles():
    tiles = tiles_of((8, 7), (4, 4))
    assert [(t.rows.start, t.columns.start) for t in tiles] == [(y, x) for y in (0, 2, 4) for x in (0, 2, 3)]
    total = torch.zeros(8, 7)
    for tile in tiles:
        assert tile.weights.shape == (4, 4)
        assert tile.weights.min() > 0
        total[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop] += tile.weights
    assert total.min() >= 1 / 3
    assert tiles[0].weights[0, 0] == 1
    assert tiles[0].centre((8, 7)) == (0.25, 2 / 7)
    assert list(boxes_within(tiles[:1], (8, 7))) == [(0, 0, 0.5, 4 / 7)]
    assert tokens_within((0, 0, 0.5, 4 / 7), (4, 7)).view(4, 7).nonzero().max(0).values.tolist() == [1, 3]


def test_tiles_of_predictions(family):
    """One tile is the model; more are cut, predicted and joined by hand."""
    pipe, kind = family.pipe, family_of(family.pipe.transformer)
    inputs = {name: x for name, x in family.inputs(pipe).items() if name != "return_dict"}
    x, transformer = inputs["hidden_states"], pipe.transformer
    rows, columns = (8, 12) if family.name in ("flux", "sd3") else (6, 8)
    with torch.no_grad():
        whole = InTiles(transformer, kind, pipe, (rows, columns), tiles_of((rows, columns), (99, 99)), [None])
        assert torch.equal(whole.predict(**inputs), transformer(**inputs, return_dict=False)[0])
        tiles = tiles_of((rows, columns), (rows, columns // 2))
        ours = InTiles(transformer, kind, pipe, (rows, columns), tiles, [None] * 3).predict(**inputs)
        total, weight = 0, 0
        for tile in tiles:
            if family.name == "flux":
                index = torch.arange(rows * columns).view(rows, columns)[:, tile.columns].flatten()
                first = torch.arange(rows * columns).view(rows, columns)[:, : columns // 2].flatten()
                own = inputs | {"hidden_states": x[:, index], "img_ids": inputs["img_ids"][first]}
                weights = tile.weights.flatten()[:, None]
                put = lambda v, index=index: torch.zeros_like(x).index_copy(1, index, v)  # noqa: E731
            else:
                cut = slice(2 * tile.columns.start, 2 * tile.columns.stop)
                own = inputs | {"hidden_states": x[..., cut]}
                weights = tile.weights.repeat_interleave(2, 0).repeat_interleave(2, 1)
                pads = (cut.start, x.shape[-1] - cut.stop)
                put = lambda v, pads=pads: torch.nn.functional.pad(v, pads)  # noqa: E731
            out = transformer(**own, return_dict=False)[0]
            total, weight = total + put(out * weights), weight + put(torch.ones_like(out) * weights)
        assert torch.allclose(ours, total / weight, atol=1e-6)
        assert not torch.allclose(ours, whole.predict(**inputs), atol=1e-5)


def test_structure_prior():
    v, x, ref = randn(3, 1, 4, 6, 8)
    on_step = Regional(structure=0.5).on_step(Before(ref, [], ref, []), Part(10))
    for step, t in ((0, 0.9), (3, 0.6)):
        c = 0.5 * (1 + math.cos(math.pi * step / 10)) / 2
        clean = x - t * v
        wanted = (x - clean - c * (haar(ref) - haar(clean))) / t
        assert torch.allclose(on_step(v, x, t, step, 10), wanted, rtol=1e-4)
    assert Regional(structure=0).on_step(Before(ref, [], ref, []), Part(10)) is None


def test_at_native_size_regional_is_the_upscaled_pass(tiny_flux):
    native = {"native": (80, 96)}
    plain = picture(tiny_flux, Upscaled(), **native)
    alone = picture(tiny_flux, Regional(structure=0, screening=None), **native)
    assert np.abs(alone - plain).max() < 1e-5
    read = picture(tiny_flux, Regional(structure=0, screening=0), **native)  # nothing is below it
    assert np.abs(read - plain).max() < 1e-4


def test_words_of_regions(tiny_flux):
    plain = picture(tiny_flux, Regional(screening=None))
    same = picture(tiny_flux, Regional({(0, 0, 1, 1): PROMPT}, screening=None))
    assert np.abs(same - plain).max() < 1e-5
    left = picture(tiny_flux, Regional({(0, 0, 1, 0.4): OTHER}, screening=None))
    assert np.abs(left - plain)[:, :, :30].max() > 1e-3
    assert np.abs(left - plain)[:, :, -20:].max() < np.abs(left - plain)[:, :, :30].max()


def test_text_of_a_prompt_is_what_the_pipeline_gives(tiny_flux):
    seen = {}
    note = lambda module, args, kwargs: seen.update(kwargs)  # noqa: E731
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 24}
    with tiny_flux.transformer.register_forward_pre_hook(note, with_kwargs=True):
        tiny_flux(OTHER, output_type="latent", **call)
    text = text_of(tiny_flux, family_of(tiny_flux.transformer), OTHER, call | {"prompt": PROMPT})
    assert sorted(text) == ["encoder_hidden_states", "pooled_projections"]
    assert all(torch.equal(value, seen[name]) for name, value in text.items())


def attention_call(text_valid=None):
    layout = TokenLayout((1, 4, 6), text_len=5, text_first=True)
    q, k, v = (randn(2, 3, 29, 8, seed=i) for i in range(3))
    return AttentionCall(q, k, v, layout, dense=lambda call: call.q, text_valid=text_valid)


@pytest.mark.parametrize("valid", [None, torch.tensor([5, 2])], ids=["all", "padded"])
def test_what_text_receives(valid):
    call = attention_call(valid)
    scores = call.q @ call.k.transpose(-1, -2) / math.sqrt(8)
    if valid is not None:
        scores[1, :, :, 2:5] = -torch.inf
    wanted = scores.softmax(-1)[:, :, 5:, :5].mean(1)
    assert torch.allclose(screening.text_probabilities(call).double(), wanted, atol=1e-6)


def test_screened_tokens_and_keys():
    received = torch.tensor([[[1.0, 4.0], [3.0, 4.0]]])  # means 2 and 4
    within = [torch.tensor([True, False]), torch.tensor([False, True])]
    assert screening.screened(received, within, 0.6).tolist() == [[[True, False], [False, False]]]
    call = attention_call()
    screen = screening.Screen(torch.tensor([[[False, True, True, False, False]]]).expand(2, 1, 5))
    screen.begin(0, slice(1, 2))
    screen.hidden = screen.hidden[1:]
    screen.begin(0, slice(1, 2))
    out = screening._Screened(ModelAttention(), screen)(call)
    scores = call.q @ call.k.transpose(-1, -2) / math.sqrt(8)
    scores[1, :, 5:, 1:3] = -torch.inf
    assert torch.allclose(out, scores.softmax(-1) @ call.v)
    screen.end()
    assert screening._Screened(ModelAttention(), screen)(call) is call.q


def test_screening_changes_tiles_and_is_kept(tiny_flux, tmp_path):
    method, path = Regional(screening=0.99), tmp_path / "base.safetensors"
    first = picture(tiny_flux, method, keep=path)
    assert np.array_equal(picture(tiny_flux, method, keep=path), first)
    assert np.abs(first - picture(tiny_flux, Regional(screening=None), keep=path)).max() > 1e-4
    with pytest.raises(ValueError, match="leave out `base`, or give the method with screening=None"):
        picture(tiny_flux, method, base=torch.rand(1, 3, 8, 8))
    path.unlink()
    picture(tiny_flux, "upscaled", keep=path)
    with pytest.raises(ValueError, match='lacks what "regional" reads in its native pass'):
        picture(tiny_flux, method, keep=path)


def test_sparse_recipes_and_guidance_in_tiles(tiny_flux):
    dit_accel.enable(tiny_flux, Recipe(Clear(3)))
    try:
        guided = {"negative_prompt": "", "true_cfg_scale": 3.0}
        assert np.isfinite(picture(tiny_flux, "regional", **guided)).all()
    finally:
        dit_accel.disable(tiny_flux)


def test_guidance_by_heads_in_tiles(tiny_flux):
    method = Regional(screening=None)
    plain = picture(tiny_flux, method)
    dit_accel.enable(tiny_flux, Recipe(Dense(), guidance=HeadPerturbation(heads=[(1, 0)])))
    try:
        guided = picture(tiny_flux, method)
    finally:
        dit_accel.disable(tiny_flux)
    assert np.isfinite(guided).all()
    assert np.abs(guided - plain).max() > 1e-4


def test_step_caches_are_refused_in_tiles(wan):
    from diffusers import FirstBlockCacheConfig

    wan.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    options = {"width": 160, "height": 160, "native": (9, 64, 64), "num_frames": 9, "method": "regional"}
    with pytest.raises(UnavailableError, match=r"tile by tile, .* call `transformer.disable_cache"):
        generate(wan.pipe, PROMPT, **options)


def test_wrong_options(wan):
    for box in ((0, 0, 1), (0.5, 0, 0.5, 1), (0, 0, 2, 1)):
        with pytest.raises(ValueError, match="`prompts` must be of boxes"):
            Regional({box: OTHER})
    with pytest.raises(ValueError, match="`screening` must be from 0 to 1"):
        Regional(screening=2)
    with pytest.raises(ValueError, match="`window` must be 2 integers"):
        Compressed((0, 3))
    with pytest.raises(UnavailableError, match="screening is for joint attention; use screening=None"):
        generate(wan.pipe, PROMPT, width=160, height=160, native=(9, 64, 64), num_frames=9, method=Regional())
