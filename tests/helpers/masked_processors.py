"""diffusers' own attention processors with a token mask put under them: oracles of what patterns compute."""

from __future__ import annotations

from functools import wraps
from unittest import mock

import torch
import torch.nn.functional as F
from chunk_masks import MaskedCausalProcessor


def both(mask: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """A mask of booleans together with one that a model gives, which may be of numbers that are added."""
    return mask & given if given.dtype == torch.bool else given.masked_fill(~mask, -torch.inf)


class MaskedProcessor:
    """The oracle: the diffusers processor itself under a dense mask, in the model's own token order."""

    def __init__(self, original, mask: torch.Tensor):
        self.original, self.mask = original, mask

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        mask = self.mask
        if attention_mask is not None:  # padded text, which stands last and may be shorter in this call
            length = attention_mask.shape[-1]
            mask = both(mask[..., :length, :length], attention_mask)
        return self.original(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


class MaskedTwiceProcessor(MaskedProcessor):
    """The same for the processor of HunyuanVideo 1.5, which makes a mask of padded text itself."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        return self.masked_twice(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=image_rotary_emb
        )

    def masked_twice(self, *args, **kwargs):
        names = type(self.original).__call__.__globals__
        dispatch = names["dispatch_attention_fn"]

        def masked_twice(query, key, value, attn_mask=None, **options):
            length = key.shape[1]
            mask = self.mask[..., :length, :length]
            mask = mask if attn_mask is None else both(mask, attn_mask)
            return dispatch(query, key, value, attn_mask=mask, **options)

        with mock.patch.dict(names, dispatch_attention_fn=masked_twice):
            return self.original(*args, **kwargs)


class MaskedAloneProcessor(MaskedTwiceProcessor):
    """The same for that of FLUX.2's parallel blocks, which attend to one stream."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        return self.masked_twice(attn, hidden_states, attention_mask, image_rotary_emb)


class MaskedQwenProcessor(MaskedTwiceProcessor):
    """The same for that of Qwen-Image, which takes the text's mask under another name."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None,
        attention_mask=None, image_rotary_emb=None,
    ):  # fmt: skip
        return self.masked_twice(
            attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
        )  # fmt: skip


class MaskedZImageProcessor(MaskedTwiceProcessor):
    """The same for that of Z-Image, whose mask (B, S) hides what stands behind shorter captions."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        return self.masked_twice(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)


class MaskedJointProcessor(MaskedProcessor):
    """The same for the processors of SD3, which ignore masks and call PyTorch's function themselves."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        attend = F.scaled_dot_product_attention
        rotary = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}

        def masked(*qkv, attn_mask=None, **options):
            return attend(*qkv, attn_mask=self.mask, **options)

        with mock.patch.object(F, "scaled_dot_product_attention", masked):
            return self.original(attn, hidden_states, encoder_hidden_states, **rotary)


class MaskedMochiProcessor(MaskedProcessor):
    """The same for Mochi's processor, which takes samples one by one, each with its valid text alone."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs):
        attend, visual = F.scaled_dot_product_attention, hidden_states.shape[1]
        samples = iter(self.mask.expand(len(hidden_states), -1, -1, -1) if self.mask.ndim == 4 else ())

        def masked(*qkv, **options):
            mask = self.mask if self.mask.ndim == 2 else next(samples)[None]
            length = qkv[0].shape[2]
            assert length <= visual + encoder_hidden_states.shape[1]
            return attend(*qkv, attn_mask=mask[..., :length, :length], **options)

        with mock.patch.object(F, "scaled_dot_product_attention", masked):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


def masked_dispatch(original, mask: torch.Tensor) -> MaskedProcessor:
    """The same for processors that take masks in forms of their own, or none."""

    class Masked(MaskedProcessor):
        @wraps(type(original).__call__)  # modules pass what its signature names
        def __call__(self, *args, **kwargs):
            names = type(self.original).__call__.__globals__
            dispatch = names["dispatch_attention_fn"]

            def masked(*qkv, attn_mask=None, **options):
                assert attn_mask is None
                return dispatch(*qkv, attn_mask=self.mask, **options)

            with mock.patch.dict(names, dispatch_attention_fn=masked):
                return self.original(*args, **kwargs)

    return Masked(original, mask)


MASKED = {
    "HunyuanVideo15AttnProcessor2_0": MaskedTwiceProcessor,
    "CogVideoXAttnProcessor2_0": MaskedJointProcessor,
    "FusedCogVideoXAttnProcessor2_0": MaskedJointProcessor,
    "JointAttnProcessor2_0": MaskedJointProcessor,
    "FusedJointAttnProcessor2_0": MaskedJointProcessor,
    "AnyFlowCausalAttnProcessor": MaskedCausalProcessor,
    "LTXVideoAttnProcessor": masked_dispatch,
    "HeliosAttnProcessor": masked_dispatch,
    "MiniMaxH3AttnProcessor": masked_dispatch,
    "Kandinsky5AttnProcessor": masked_dispatch,
    "LTX2AudioVideoAttnProcessor": masked_dispatch,
    "LTX2PerturbedAttnProcessor": masked_dispatch,
    "MochiAttnProcessor2_0": MaskedMochiProcessor,
    "HunyuanImageAttnProcessor": MaskedTwiceProcessor,
    "ZSingleStreamAttnProcessor": MaskedZImageProcessor,
    "Flux2ParallelSelfAttnProcessor": MaskedAloneProcessor,
    "QwenDoubleStreamAttnProcessor2_0": MaskedQwenProcessor,
}
