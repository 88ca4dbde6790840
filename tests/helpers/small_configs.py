"""Small transformers of four families, as configurations that plans take."""

from __future__ import annotations

from dit_accel.planning.model_config import ModelConfig

WIDTH, HEADS, HEAD_DIM, LAYERS, FEED, TEXT = 24, 2, 12, 3, 40, 7
WAN = ModelConfig(
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
FLUX = ModelConfig(
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
SD3 = ModelConfig(
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
HUNYUAN = ModelConfig(
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
