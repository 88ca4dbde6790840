"""Configurations of the bundled models' text encoders."""

from __future__ import annotations

import re
from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING

from .word_tokenizers import SPECIAL_TOKENS

if TYPE_CHECKING:
    from torch import nn

TEXT_LENGTH = 24  # tokens a prompt is padded to; the longest caption has 19
TEXT_DIM = 128
PAD, END = SPECIAL_TOKENS.index("<pad>"), SPECIAL_TOKENS.index("</s>")


def t5(cls: type, config_cls: type, words: Sized, layers: int, width: int = TEXT_DIM):
    """A T5-style encoder of ``layers`` layers over special tokens and ``words``."""
    return cls(
        config_cls(
            vocab_size=len(SPECIAL_TOKENS) + len(words),
            d_model=width,
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


def start_from(encoder: nn.Module, folder: Path) -> None:
    """Gives a `t5` encoder the weights of the one in ``folder``, of the same sizes.

    UMT5 has a table of distances in every layer, T5 one in its first: each table then is a copy of that.
    """
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    found["encoder.embed_tokens.weight"] = found["shared.weight"]
    own = encoder.state_dict()
    encoder.load_state_dict({name: found.get(name, found.get(_in_first_layer(name))) for name in own})


def _in_first_layer(name: str) -> str:
    return re.sub(r"block\.\d+", "block.0", name)


def clip(cls: type, words: Sized, width: int = TEXT_DIM, length: int = TEXT_LENGTH):
    """A CLIP text encoder of one layer over special tokens and ``words``, for texts of ``length`` tokens."""
    from transformers import CLIPTextConfig

    return cls(
        CLIPTextConfig(
            vocab_size=len(SPECIAL_TOKENS) + len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=length,
            pad_token_id=PAD,
            bos_token_id=END,
            eos_token_id=END,
        )
    )


def llama(vocabulary_size: int, width: int):
    """A Llama of three layers: the pipeline takes what the first returns, and the other two never matter."""
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            pad_token_id=PAD,
            use_cache=False,
        )
    )
