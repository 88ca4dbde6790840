"""Configurations of models: geometry is what families read, FLOPs a hand count's, folders say all of it."""

from __future__ import annotations

import json

import pytest
import torch
from small_configs import FEED, FLUX, HEAD_DIM, HEADS, HUNYUAN, LAYERS, SD3, SMALL, TEXT, WAN, WIDTH

from dit_accel import TokenLayout
from dit_accel.patterns import Clear, Neighborhood
from dit_accel.planning.model_config import ModelConfig, of_model
from dit_accel.planning.plan import plan


class TestGeometry:
    @pytest.mark.parametrize(
        ("model_config", "layout"),
        [
            (FLUX, TokenLayout((1, 12, 16), text_len=TEXT, text_first=True)),
            (SD3, TokenLayout((1, 12, 16), text_len=TEXT)),
            (HUNYUAN, TokenLayout((3, 6, 8), text_len=TEXT)),
            (WAN, TokenLayout((3, 6, 8))),
        ],
        ids=lambda value: value.name if isinstance(value, ModelConfig) else "",
    )
    def test_is_what_the_family_reads_from_a_call(self, model_config, layout):
        transformer = model_config.transformer()
        grid = model_config.grid(transformer, model_config.size)
        inputs = model_config.inputs(transformer, grid, lambda *shape: torch.zeros(shape))
        assert model_config.layout(grid) == layout == model_config.description.layout(transformer, inputs, {})


class TestFlops:
    @pytest.mark.parametrize("model_config", SMALL, ids=lambda b: b.name)
    def test_of_attention(self, model_config):
        transformer = model_config.transformer()
        grid = model_config.grid(transformer, model_config.size)
        flops = model_config.flops(transformer, grid)
        for name, count in flops.layers.items():
            tokens = model_config.description.layer_layout(name, model_config.layout(grid)).seq_len
            assert count == 4 * HEADS * HEAD_DIM * tokens**2
        others = {"wan": LAYERS * 4 * WIDTH * 3 * 6 * 8 * TEXT, "hunyuan-video": 4 * WIDTH * TEXT**2}
        assert flops.other_attention == others.get(model_config.family, 0)

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
        assert (found.transformers, found.timestep_per_token, found.config) == (2, True, WAN.config)
        answer = plan(Neighborhood((3, 5)), model=str(tmp_path), size=(256, 192), frames=9)
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

    @pytest.mark.parametrize(
        ("pipeline", "reference"), [("QwenImagePipeline", None), ("QwenImageEditPipeline", (1, 64, 64))]
    )
    def test_qwen_image_edit_has_the_tokens_of_a_given_image(self, tmp_path, pipeline, reference):
        sizes = {"num_layers": 1, "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}
        sizes |= {"joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4), "in_channels": 16}
        files = {
            "model_index.json": {"_class_name": pipeline},
            "transformer/config.json": {"_class_name": "QwenImageTransformer2DModel", **sizes},
            "vae/config.json": {"temperal_downsample": [False, True, True]},
        }
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content))
        found = of_model(str(tmp_path))
        assert (found.family, found.vae, found.text_len, found.size) == (
            "qwen-image",
            (1, 8),
            512,
            (1, 1328, 1328),
        )
        answer = plan(Clear(3), model=str(tmp_path), size=(256, 192))
        assert (answer.grid, answer.layout.anchor) == ((1, 12, 16), reference)
        assert answer.tokens == 12 * 16 + 512 + (64 * 64 if reference else 0)

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
