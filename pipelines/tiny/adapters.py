"""What training needs to know about a family: how its autoencoder, text encoders and transformer are called.

Latents here are normalised as the transformer sees them, unpacked: (B, C, F, H, W) with F = 1 for images.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import nn

from .hunyuan import standardise
from .models import TEXT_LENGTH, Size, Spec


class Adapter(ABC):
    """Trains a pipeline of one family; ``pipe`` holds the modules that are trained in place."""

    crop: ClassVar[Size]  # what the autoencoder is trained on
    canvases: ClassVar[tuple[int, ...]] = (48, 64, 64, 96, 128, 192, 256, 512)  # sides of whole scenes
    anywhere: ClassVar[float] = 0.25  # share of crops that need not lie across an object's outline
    still: ClassVar[float] = 0.0  # share of the autoencoder's stage, at its start, on single frames
    text_encoders: ClassVar[tuple[str, ...]]
    text_first: ClassVar[bool] = False  # in joint attention
    text_length: ClassVar[int] = TEXT_LENGTH

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The modules of the second stage."""
        return {name: getattr(self.pipe, name) for name in ("transformer", *self.text_encoders)}

    @property
    @abstractmethod
    def landmark(self) -> nn.Module:
        """The block after which visual tokens are to know where they are (see ``flow.PositionProbe``)."""

    def visual(self, output: Any) -> torch.Tensor:
        """Visual tokens (B, N, D) in what ``landmark`` returns."""
        return output

    @property
    def width(self) -> int:
        """Channels of a token inside the transformer."""
        config = self.pipe.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    @abstractmethod
    def posterior(self, pixels: torch.Tensor) -> Any:
        """Latent distribution, not normalised, of pixels (B, 3, F, H, W) in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, F, H, W) of latents that are not normalised."""

    @abstractmethod
    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Stores the mean and deviation of the latents, each (C,), where the pipeline looks for them."""

    @abstractmethod
    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the transformer sees them."""

    @abstractmethod
    def encode_text(self, captions: list[str], length: int) -> Any:
        """The transformer's text inputs, ``length`` tokens each, with gradients."""

    @abstractmethod
    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Any) -> torch.Tensor:
        """Predicted noise minus latents for noisy latents (B, C, F, H, W) at noise levels ``sigma`` (B,)."""

    @abstractmethod
    def placed(self, canvas: torch.Size, kept: torch.Tensor) -> AbstractContextManager:
        """Context in which latents of one row of n tokens are the tokens ``kept`` (n,) of a larger canvas.

        The transformer gives them the positions that they have among all tokens of latents of shape
        ``canvas`` (B, C, F, H, W).
        """

    @abstractmethod
    def shift(self, latents: torch.Tensor) -> float:
        """Factor s by which the scheduler moves noise levels here: u becomes s u / (1 + (s - 1) u)."""


class ImageAdapter(Adapter):
    """What FLUX and SD3 share: the autoencoder, and noise shifted by the number of tokens."""

    crop = (1, 64, 64)

    def visual(self, output: Any) -> torch.Tensor:
        return output[1]

    def posterior(self, pixels: torch.Tensor) -> Any:
        return self.pipe.vae.encode(pixels[:, :, 0]).latent_dist

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipe.vae.decode(latents).sample.unsqueeze(2)

    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.pipe.vae.register_to_config(
            shift_factor=round(mean.mean().item(), 4), scaling_factor=round(1 / std.mean().item(), 4)
        )

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        return ((latents - config.shift_factor) * config.scaling_factor).unsqueeze(2)

    def shift(self, latents: torch.Tensor) -> float:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipe.scheduler.config
        tokens = latents.shape[-2] * latents.shape[-1] // 4
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        return math.exp(calculate_shift(tokens, *lengths, config.base_shift, config.max_shift))


class FluxAdapter(ImageAdapter):
    """Trains a FLUX pipeline."""

    text_first = True
    text_encoders = ("text_encoder", "text_encoder_2")

    @property
    def landmark(self) -> nn.Module:
        return self.pipe.transformer.transformer_blocks[-1]

    def encode_text(self, captions: list[str], length: int) -> Any:
        return self.pipe.encode_prompt(captions, captions, max_sequence_length=length)

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Any) -> torch.Tensor:
        prompt, pooled, text_ids = text
        batch, channels, _, height, width = noisy.shape
        packed = self.pipe._pack_latents(noisy[:, :, 0], batch, channels, height, width)
        image_ids = self.pipe._prepare_latent_image_ids(
            batch, height // 2, width // 2, noisy.device, torch.float32
        )
        output = self.pipe.transformer(
            hidden_states=packed,
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=prompt,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(output, height * scale, width * scale, scale).unsqueeze(2)

    def placed(self, canvas: torch.Size, kept: torch.Tensor) -> AbstractContextManager:
        positions = self.pipe.transformer.pos_embed
        embed, (height, width) = positions.forward, canvas[-2:]

        def embed_kept(ids: torch.Tensor) -> Any:
            every = self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, ids.device, ids.dtype)
            return embed(torch.cat([ids[: -len(kept)], every[kept]]))

        return mock.patch.object(positions, "forward", embed_kept)


class SD3Adapter(ImageAdapter):
    """Trains a Stable Diffusion 3 pipeline."""

    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def landmark(self) -> nn.Module:
        return self.pipe.transformer.transformer_blocks[2]

    def encode_text(self, captions: list[str], length: int) -> Any:
        prompt, _, pooled, _ = self.pipe.encode_prompt(
            captions, captions, captions, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return prompt, pooled

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Any) -> torch.Tensor:
        prompt, pooled = text
        output = self.pipe.transformer(
            hidden_states=noisy[:, :, 0],
            timestep=sigma * self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return output.unsqueeze(2)

    def placed(self, canvas: torch.Size, kept: torch.Tensor) -> AbstractContextManager:
        positions = self.pipe.transformer.pos_embed
        every = positions.cropped_pos_embed(*canvas[-2:])
        return mock.patch.object(positions, "cropped_pos_embed", return_value=every[:, kept])


class VideoAdapter(Adapter):
    """What Wan and HunyuanVideo share: how their autoencoders are called, and rotary positions."""

    crop = (9, 32, 32)
    rotary_axis: ClassVar[int]  # of the tokens in a table of rotary embeddings

    def posterior(self, pixels: torch.Tensor) -> Any:
        return self.pipe.vae.encode(pixels).latent_dist

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipe.vae.decode(latents).sample

    def placed(self, canvas: torch.Size, kept: torch.Tensor) -> AbstractContextManager:
        rope = self.pipe.transformer.rope
        every = rope(torch.empty(canvas, device=kept.device))
        chosen = tuple(table.index_select(self.rotary_axis, kept) for table in every)
        return mock.patch.object(rope, "forward", return_value=chosen)


class WanAdapter(VideoAdapter):
    """Trains a Wan pipeline."""

    rotary_axis = 1
    text_encoders = ("text_encoder",)

    @property
    def landmark(self) -> nn.Module:
        return self.pipe.transformer.blocks[2]

    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        def rounded(values: torch.Tensor) -> list[float]:
            return [round(value, 4) for value in values.tolist()]

        self.pipe.vae.register_to_config(latents_mean=rounded(mean), latents_std=rounded(std))

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        mean = latents.new_tensor(config.latents_mean).view(-1, 1, 1, 1)
        return (latents - mean) / latents.new_tensor(config.latents_std).view(-1, 1, 1, 1)

    def encode_text(self, captions: list[str], length: int) -> Any:
        prompt, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return prompt

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Any) -> torch.Tensor:
        steps = self.pipe.scheduler.config.num_train_timesteps
        return self.pipe.transformer(
            hidden_states=noisy, timestep=sigma * steps, encoder_hidden_states=text, return_dict=False
        )[0]

    def shift(self, latents: torch.Tensor) -> float:
        return self.pipe.scheduler.config.flow_shift


class HunyuanVideoAdapter(VideoAdapter):
    # Its padding keeps a crop of one colour constant all through, and group norm divides by its deviation:
    # gradients of a few such crops drown all others. So every crop is large and shows some of an object.
    # Colours it learns from pictures within a hundred steps, from moving crops hardly in a thousand.
    """Trains a HunyuanVideo pipeline."""

    crop = (5, 64, 64)
    canvases = (64, 96, 128, 192)
    anywhere = 0.0
    still = 0.1
    rotary_axis = 0
    text_encoders = ("text_encoder", "text_encoder_2")

    @property
    def landmark(self) -> nn.Module:
        return self.pipe.transformer.transformer_blocks[-1]

    def visual(self, output: Any) -> torch.Tensor:
        return output[0]

    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        standardise(self.pipe.vae, mean, std)

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def encode_text(self, captions: list[str], length: int) -> Any:
        return self.pipe.encode_prompt(captions, max_sequence_length=length)

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Any) -> torch.Tensor:
        prompt, pooled, mask = text
        return self.pipe.transformer(
            hidden_states=noisy,
            timestep=sigma * self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=prompt,
            encoder_attention_mask=mask.to(noisy.dtype),
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def shift(self, latents: torch.Tensor) -> float:
        return self.pipe.scheduler.config.shift


ADAPTERS: dict[str, type[Adapter]] = {
    "flux": FluxAdapter,
    "sd3": SD3Adapter,
    "wan": WanAdapter,
    "hunyuan-video": HunyuanVideoAdapter,
}


def adapter(spec: Spec, pipe: Any) -> Adapter:
    """The adapter of ``pipe``, a pipeline of ``spec``."""
    return ADAPTERS[spec.family](pipe)
