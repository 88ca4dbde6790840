"""Configurations of the bundled models, built from the real diffusers and transformers classes.

A ``Spec`` says what a model is (sizes, defaults, its pipeline); a family's ``Adapter`` (``adapters.py``) says
how to train it. A new family is one build function, one ``Spec`` and one adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .captions import SPECIAL_TOKENS, tokenizer, vocabulary

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TEXT_LENGTH = 24  # tokens a prompt is padded to; the longest caption has 17
TEXT_DIM = 128
PAD, END = SPECIAL_TOKENS.index("<pad>"), SPECIAL_TOKENS.index("</s>")

Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Spec:
    """A bundled model: ``native`` is the size it trained on most, ``demo`` one of thousands of tokens."""

    name: str
    family: str
    description: str
    native: Size
    demo: Size
    steps: int
    guidance: float
    build: Callable[[], DiffusionPipeline]
    max_sequence_length: int = TEXT_LENGTH

    @property
    def video(self) -> bool:
        return self.native[0] > 1


def _t5(cls: type, config_cls: type, layers: int):
    """A T5-style encoder of ``layers`` layers over the shared vocabulary."""
    return cls(
        config_cls(
            vocab_size=len(vocabulary()),
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=layers,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            eos_token_id=END,
            tie_word_embeddings=False,
        )
    )


def build_flux() -> DiffusionPipeline:
    """tiny-flux with untrained weights: 8x8 pixels per token."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=(8, 12, 12),
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary()),
            hidden_size=TEXT_DIM,
            intermediate_size=256,
            projection_dim=TEXT_DIM,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            pad_token_id=PAD,
            bos_token_id=END,
            eos_token_id=END,
        )
    )
    # 64 tokens are shifted by e^0.5, 2304 by e^2.3: the noise that hides a scene's layout grows with the
    # square root of the tokens it is drawn with, here by sqrt(2304 / 64) = 6 = e^1.8.
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=64,
        max_image_seq_len=2304,
        base_shift=0.5,
        max_shift=2.3,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer(TEXT_LENGTH),
        text_encoder_2=_t5(T5EncoderModel, T5Config, layers=1),
        tokenizer_2=tokenizer(TEXT_LENGTH),
        transformer=transformer,
    )


def _prepare_wan_vae(vae) -> None:
    """Starting values that an autoencoder this narrow learns from quickly."""
    import torch
    from torch import nn

    # PyTorch's default weights shrink a signal by sqrt(3) per convolution; after a dozen only the biases are
    # left, which this autoencoder's norms, unlike group norm, never remove.
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                module.weight.mul_(3**0.5)
                nn.init.zeros_(module.bias)
        vae.quant_conv.bias[vae.z_dim :] = -5.0  # narrow posteriors: a wide one drowns the first signal
    # Its attention spans whole frames, so it would act differently at every size: kept at zero instead.
    for half in (vae.encoder, vae.decoder):
        for attention in half.mid_block.attentions:
            nn.init.zeros_(attention.proj.weight)
            nn.init.zeros_(attention.proj.bias)
            attention.requires_grad_(False)


def build_wan() -> DiffusionPipeline:
    """tiny-wan with untrained weights: 4 frames of 8x8 pixels per token (1 frame in the first)."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    z_dim = 8
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=z_dim,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
    _prepare_wan_vae(vae)
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=z_dim,
        out_channels=z_dim,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=512,
        num_layers=7,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, final_sigmas_type="zero"
    )
    return WanPipeline(
        tokenizer=tokenizer(TEXT_LENGTH),
        text_encoder=_t5(UMT5EncoderModel, UMT5Config, layers=2),
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
    )


SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            name="tiny-flux",
            family="flux",
            description="FLUX in 2.6 M parameters: a coloured shape on a grey background",
            native=(1, 64, 64),
            demo=(1, 384, 384),
            steps=20,
            guidance=4.0,
            build=build_flux,
        ),
        Spec(
            name="tiny-wan",
            family="wan",
            description="Wan 2.1 in 2.5 M parameters: a coloured shape that moves over a grey background",
            native=(17, 64, 64),
            demo=(125, 128, 128),
            steps=12,
            guidance=3.0,
            build=build_wan,
        ),
    )
}


def spec(name: str) -> Spec:
    """The bundled model called ``name``."""
    if name not in SPECS:
        raise ValueError(f"no bundled model is called {name!r}; there are {', '.join(SPECS)}")
    return SPECS[name]


def weights_dir(name: str) -> Path:
    """The pipeline folder of bundled model ``name``."""
    return Path(__file__).parent / "weights" / spec(name).name
