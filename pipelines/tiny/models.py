"""Configurations of the bundled models, built from the real diffusers and transformers classes.

A ``Spec`` says what a model is (sizes, defaults, its pipeline); a family's ``Adapter`` (``adapters.py``) says
how to train it. A new family is one build function, one ``Spec`` and one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import hunyuan
from .captions import vocabulary
from .starting import keep_signals
from .text_encoders import TEXT_DIM, TEXT_LENGTH, clip, t5
from .word_tokenizers import tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Spec:
    """A bundled model: ``native`` is the size it trained on most, ``demo`` one of thousands of tokens.

    ``assemble`` makes its pipeline, untrained, for a vocabulary.
    """

    name: str
    family: str
    description: str
    native: Size
    demo: Size
    steps: int
    guidance: float
    assemble: Callable[[Sequence[str]], DiffusionPipeline]
    max_sequence_length: int = TEXT_LENGTH

    @property
    def video(self) -> bool:
        return self.native[0] > 1

    def build(self) -> DiffusionPipeline:
        """The pipeline with untrained weights, which knows the words of captions."""
        return self.assemble(vocabulary())


def _image_autoencoder():
    """Autoencoder of the image models: 4x4 pixels per latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
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


def _image_scheduler():
    """Scheduler of the image models, whose pipelines shift noise by the number of tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    # 64 tokens are shifted by e^0.5, 2304 by e^1.9: the noise that hides an object's place or outline grows
    # with the side, in tokens, of the canvas (6 times as many) or of the object (3 times): here by e^1.4 = 4.
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=64,
        max_image_seq_len=2304,
        base_shift=0.5,
        max_shift=1.9,
    )


def build_flux(words: Sequence[str]) -> DiffusionPipeline:
    """tiny-flux with untrained weights: 8x8 pixels per token."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    vae = _image_autoencoder()
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
    return FluxPipeline(
        scheduler=_image_scheduler(),
        vae=vae,
        text_encoder=clip(CLIPTextModel, words),
        tokenizer=tokenizer(words, TEXT_LENGTH),
        text_encoder_2=t5(T5EncoderModel, T5Config, words, layers=2),
        tokenizer_2=tokenizer(words, TEXT_LENGTH),
        transformer=transformer,
    )


def build_sd3(words: Sequence[str]) -> DiffusionPipeline:
    """tiny-sd3 with untrained weights: 8x8 pixels per token, and SD3.5's norms and dual attention layers.

    Its blocks are as wide as tiny-flux's, so that its text encoder can start from that model's. The table of
    positions, 64 x 64 tokens, is a fifth of the transformer's weights.
    """
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip_widths = (32, 64)
    vae = _image_autoencoder()
    transformer = SD3Transformer2DModel(
        sample_size=96,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=TEXT_DIM,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=sum(clip_widths),
        pos_embed_max_size=64,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    first, second = (clip(CLIPTextModelWithProjection, words, size) for size in clip_widths)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_image_scheduler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer(words, TEXT_LENGTH),
        text_encoder_2=second,
        tokenizer_2=tokenizer(words, TEXT_LENGTH),
        text_encoder_3=t5(T5EncoderModel, T5Config, words, layers=2),
        tokenizer_3=tokenizer(words, TEXT_LENGTH),
    )


def _prepare_wan_vae(vae) -> None:
    """Starting values of tiny-wan's autoencoder."""
    from torch import nn

    keep_signals(vae, vae.z_dim)
    # Its attention spans whole frames, so it would act differently at every size: held at zero instead.
    for half in (vae.encoder, vae.decoder):
        for attention in half.mid_block.attentions:
            nn.init.zeros_(attention.proj.weight)
            nn.init.zeros_(attention.proj.bias)
            attention.requires_grad_(False)


def build_wan(words: Sequence[str]) -> DiffusionPipeline:
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
        tokenizer=tokenizer(words, TEXT_LENGTH),
        text_encoder=t5(UMT5EncoderModel, UMT5Config, words, layers=2),
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
            description="FLUX in 3.0 M parameters: emoji, one or two, on a patterned background",
            native=(1, 64, 64),
            demo=(1, 384, 384),
            steps=20,
            guidance=4.0,
            assemble=build_flux,
        ),
        Spec(
            name="tiny-sd3",
            family="sd3",
            description="SD3.5 in 3.0 M parameters: emoji, one or two, on a patterned background",
            native=(1, 64, 64),
            demo=(1, 384, 384),
            steps=20,
            guidance=5.0,
            assemble=build_sd3,
        ),
        Spec(
            name="tiny-wan",
            family="wan",
            description="Wan 2.1 in 2.5 M parameters: an emoji that moves over a patterned background",
            native=(17, 64, 64),
            demo=(65, 176, 176),
            steps=12,
            guidance=3.0,
            assemble=build_wan,
        ),
        Spec(
            name="tiny-hunyuan-video",
            family="hunyuan-video",
            description="HunyuanVideo in 2.9 M parameters: an emoji that moves over a patterned background",
            native=(17, 64, 64),
            demo=(65, 176, 176),
            steps=16,
            guidance=3.0,
            assemble=hunyuan.build,
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
