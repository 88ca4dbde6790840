"""Plans: densities are the masks', FLOPs a hand count's, bad input is refused."""

from __future__ import annotations

import json

import pytest
import torch

from dit_accel import Recipe, TokenLayout, accelerated
from dit_accel.binding import block_sizes
from dit_accel.blueprint import Blueprint, of_model
from dit_accel.patterns import Dense, Neighborhood, SparseVideoGen
from dit_accel.pipelines import tiny
from dit_accel.plan import plan
from dit_accel.rates import Rates, measured
from dit_accel.runs import Request, build_masks, load

WIDTH, HEADS, HEAD_DIM, LAYERS, FEED, TEXT = 24, 2, 12, 3, 40, 7
WAN = Blueprint(
    "small-wan",
    "wan",
    {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 8,
        "ffn_dim": FEED,
        "num_layers": LAYERS,
    },
    vae=(4, 8),
    text_len=TEXT,
    size=(9, 96, 128),
    steps=10,
)
FLUX = Blueprint(
    "small-flux",
    "flux",
    {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 4),
    },
    vae=(1, 8),
    text_len=TEXT,
    size=(1, 192, 256),
    steps=4,
)
SD3 = Blueprint(
    "small-sd3",
    "sd3",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "caption_projection_dim": WIDTH,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    vae=(1, 8),
    text_len=TEXT,
    size=(1, 192, 256),
    steps=4,
)
HUNYUAN = Blueprint(
    "small-hunyuan",
    "hunyuan-video",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 4, 4),
        "guidance_embeds": True,
    },
    vae=(4, 8),
    text_len=TEXT,
    size=(9, 96, 128),
    steps=10,
)
SMALL = (FLUX, SD3, HUNYUAN, WAN)
NEAR = Neighborhood((3, 5))
MEASURED = Rates((0.5, 0.6, 0.8), 0.5, "a test")


class TestGeometry:
    @pytest.mark.parametrize(
        ("blueprint", "layout"),
        [
            (FLUX, TokenLayout((1, 12, 16), text_len=TEXT, text_first=True)),
            (SD3, TokenLayout((1, 12, 16), text_len=TEXT)),
            (HUNYUAN, TokenLayout((3, 6, 8), text_len=TEXT)),
            (WAN, TokenLayout((3, 6, 8))),
        ],
        ids=lambda value: value.name if isinstance(value, Blueprint) else "",
    )
    def test_is_what_the_family_reads_from_a_call(self, blueprint, layout):
        transformer = blueprint.transformer()
        grid = blueprint.grid(transformer, blueprint.size)
        inputs = blueprint.inputs(transformer, grid, lambda *shape: torch.zeros(shape))
        assert blueprint.layout(grid) == layout == blueprint.description.layout(transformer, inputs, {})


class TestDensities:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("blueprint", SMALL, ids=lambda b: b.name)
    def test_are_those_of_the_pattern_and_the_mask(self, blueprint, device):
        recipe = Recipe(NEAR, dense_layers=1, order="tile")
        answer = plan(recipe, model=blueprint, device=device)
        blocks = answer.block_size
        assert blocks in block_sizes(recipe, device)
        found = {name: group for group in answer.layers for name in group.names}
        family = blueprint.description
        assert list(found) == list(dict.fromkeys(sum((g.names for g in answer.layers), ())))
        for name in family.layers(blueprint.transformer()):
            own = family.layer_layout(name, blueprint.layout(answer.grid))
            mask = NEAR.block_mask(own, blocks, "tile")
            if found[name].pattern is None:
                assert found[name].density == found[name].block_density == 1
                assert found[name].reason == "dense_layers"
            else:
                assert found[name].density == pytest.approx(NEAR.density(own), rel=1e-12)
                assert found[name].block_density == mask.block_density

    @pytest.mark.parametrize("blueprint", [FLUX, WAN], ids=lambda b: b.name)
    def test_under_each_order(self, blueprint):
        answer = plan(NEAR, model=blueprint)
        layout = blueprint.layout(answer.grid)
        assert [row.order for row in answer.orders] == ["raster", "tile", "hilbert", "auto"]
        for row in answer.orders:
            assert row.block_density == NEAR.block_mask(layout, answer.block_size, row.order).block_density
        *others, auto = answer.orders
        assert auto.takes in [row.order for row in others]
        assert auto.block_density == next(r.block_density for r in others if r.order == auto.takes)
        assert answer.block_density == pytest.approx(auto.block_density, rel=1e-12)  # averaged over layers

    def test_heads_that_choose_have_orders_of_their_own(self):
        pattern = SparseVideoGen(keep=0.5, block_size=16)
        answer = plan(pattern, model=WAN)
        mask = pattern.head_mask(WAN.layout(answer.grid), answer.block_size)
        assert [(row.order, row.block_density) for row in answer.orders] == [
            ("of each head", mask.block_density)
        ]
        assert answer.density == mask.density


@pytest.mark.parametrize("name", tiny.NAMES)
def test_is_what_a_real_run_builds(name):
    recipe = Recipe(NEAR, dense_layers=1)
    answer = plan(recipe, model=name, size=(96, 64), frames=9 if tiny.INFO[name].video else None)
    frames = answer.size[0] if tiny.INFO[name].video else None
    pipe = load(name, torch.float32, torch.device("cpu"))
    request = Request("a red circle", 96, 64, frames, 2).with_defaults(name, "native")
    with accelerated(pipe, recipe) as handle:
        build_masks(pipe, request)
        geometry = handle.bindings["transformer"].geometry
    assert geometry.layout == answer.layout
    assert geometry.over_layers(geometry.densities) == answer.density
    assert geometry.over_layers(geometry.block_densities) == answer.block_density


class TestFlops:
    @pytest.mark.parametrize("blueprint", SMALL, ids=lambda b: b.name)
    def test_of_attention(self, blueprint):
        transformer = blueprint.transformer()
        grid = blueprint.grid(transformer, blueprint.size)
        flops = blueprint.flops(transformer, grid)
        for name, count in flops.layers.items():
            tokens = blueprint.description.layer_layout(name, blueprint.layout(grid)).seq_len
            assert count == 4 * HEADS * HEAD_DIM * tokens**2
        others = {"wan": LAYERS * 4 * WIDTH * 3 * 6 * 8 * TEXT, "hunyuan-video": 4 * WIDTH * TEXT**2}
        assert flops.other_attention == others.get(blueprint.family, 0)

    def test_of_the_rest_of_wan(self):
        transformer = WAN.transformer()
        grid = WAN.grid(transformer, WAN.size)
        tokens = grid[0] * grid[1] * grid[2]
        projections = 4 * WIDTH**2 * tokens + 2 * WIDTH**2 * (tokens + TEXT)  # self- and cross-attention
        block = 2 * (projections + 2 * WIDTH * FEED * tokens) + 4 * WIDTH * tokens * TEXT
        patches = 2 * tokens * WIDTH * 4 * 4 * 2  # into tokens and back: 4 channels, 2 x 2 latents
        time = 2 * (8 * WIDTH + WIDTH**2 + 6 * WIDTH**2)
        text = 2 * TEXT * (16 * WIDTH + WIDTH**2)
        assert WAN.flops(transformer, grid).rest == LAYERS * block + patches + time + text


class TestPrediction:
    def test_by_hand(self):
        answer = plan(Recipe(NEAR, dense_layers=1, dense_steps=2), model=WAN, rates=MEASURED)
        attention = 4 * WIDTH * answer.tokens**2
        paid = answer.layers[1].block_density
        assert answer.attention.predicted == pytest.approx(0.6 / paid)
        assert (answer.attention.low, answer.attention.high) == pytest.approx((0.5 / paid, 0.8 / paid))
        assert answer.attention.ideal == pytest.approx(1 / paid)
        rest = answer.flops.rest / 0.5
        step = (3 * attention + rest) / (attention + 2 * attention * paid / 0.6 + rest)
        assert answer.step.predicted == pytest.approx(step)
        assert (answer.steps, answer.dense_steps) == (10, 2)
        assert answer.run.predicted == pytest.approx(10 / (2 + 8 / step))

    def test_dense_changes_nothing(self):
        answer = plan(Dense(), model=WAN, rates=MEASURED)
        assert (answer.density, answer.block_density, answer.orders, answer.mask) == (1, 1, (), None)
        assert answer.attention.predicted == answer.step.predicted == answer.run.predicted == 1

    def test_nothing_is_claimed_where_nothing_is_measured(self, tmp_path):
        rates = measured("cpu", "float32", 64, folder=tmp_path)
        assert rates == Rates(None, None, "block-sparse attention is not measured on cpu in float32")
        answer = plan(NEAR, model=WAN, rates=rates)
        assert answer.attention.predicted is answer.step.low is answer.run.high is None
        assert answer.attention.ideal == pytest.approx(1 / answer.block_density)
        assert "not measured" in answer.notes[0]
        assert "assumed" in answer.notes[1]

    def test_a_backend_that_was_not_measured(self):
        answer = plan(Recipe(NEAR, backend="reference"), model=WAN, rates=MEASURED)
        assert answer.attention.predicted is None
        assert "'reference' is not measured" in answer.notes[0]


class TestMemory:
    def test_by_hand(self):
        answer = plan(NEAR, model=WAN, dtype=torch.bfloat16)
        assert answer.memory.qkv_and_output == 4 * answer.tokens * WIDTH * 2
        assert answer.memory.scores_never_made == answer.tokens**2 * HEADS * 2
        assert answer.memory.weights == 2 * sum(p.numel() for p in WAN.transformer().parameters())
        mask = answer.mask
        tensors = (mask.full_ptr, mask.full_idx, mask.part_ptr, mask.part_idx, mask.part_tile, mask.tiles)
        order = 0 if mask.order is None else mask.order.nbytes
        assert answer.memory.masks == sum(t.nbytes for t in tensors) + order


class TestRefuses:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"family": "sora"}, "the families are flux, sd3, hunyuan-video, wan"),
            ({"family": "wan", "variant": "wan3"}, "its variants are wan2.1-14b"),
            ({}, "got neither"),
            ({"family": "wan", "model": "tiny-wan"}, "got both"),
            ({"model": WAN, "variant": "wan2.1-14b"}, "goes with `family`"),
            ({"model": "nothing/here"}, "neither a bundled model nor a pipeline folder"),
            ({"model": WAN, "size": (128, 90)}, "height must be a multiple of 16 .* got 90; try 80 or 96"),
            ({"model": WAN, "frames": 10}, "multiple of 4 plus 1 .* got 10; try 9 or 13"),
            ({"model": FLUX, "frames": 9}, "small-flux makes images"),
            ({"model": WAN, "size": (64, 64)}, "window"),
            ({"model": WAN, "steps": 0}, "`steps` must be a positive integer"),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            plan(Neighborhood((5, 5)), **arguments)

    def test_a_recipe_of_another_family(self):
        with pytest.raises(ValueError, match="'flux-clear-r16' is for the family 'flux', but small-wan"):
            plan("flux-clear-r16", model=WAN)


class TestFolder:
    def test_reads_configurations_alone(self, tmp_path):
        files = {
            "model_index.json": {"transformer_2": ["diffusers", "Wan"], "expand_timesteps": True},
            "transformer/config.json": {"_class_name": "WanTransformer3DModel", **WAN.config},
            "vae/config.json": {"scale_factor_temporal": 4, "scale_factor_spatial": 16},
        }
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content))
        found = of_model(str(tmp_path))
        assert (found.family, found.vae, found.text_len) == ("wan", (4, 16), 512)
        assert (found.transformers, found.expand_timesteps, found.config) == (2, True, WAN.config)
        answer = plan(NEAR, model=str(tmp_path), size=(256, 192), frames=9)
        assert answer.grid == (3, 6, 8)
        assert "2 transformers" in answer.notes[-1]

    def test_sd3_has_the_tokens_of_clip_and_t5(self, tmp_path):
        files = {
            "model_index.json": {},
            "transformer/config.json": {"_class_name": "SD3Transformer2DModel", **SD3.config},
            "vae/config.json": {"block_out_channels": [8, 8, 8, 8]},
            "tokenizer/tokenizer_config.json": {"model_max_length": 77},
        }
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content))
        found = of_model(str(tmp_path))
        assert (found.vae, found.text_len) == ((1, 8), 77 + 256)

    def test_a_transformer_of_no_family(self, tmp_path):
        for name, content in {
            "model_index.json": {},
            "transformer/config.json": {"_class_name": "Sora"},
            "vae/config.json": {},
        }.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is a Sora, which plans do not know"):
            of_model(str(tmp_path))
