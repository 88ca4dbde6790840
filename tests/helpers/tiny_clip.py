"""Tiny random CLIP models with image processor and tokenizer, in the files that `transformers` writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ("<|startoftext|>", "<|endoftext|>", "a", "red", "blue", "circle")


def save_clip(path: Path, seed: int = 0) -> Path:
    """Weights, image processor and tokenizer of a CLIP of 16 x 16 pixels, 8 tokens and `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 6, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**text, "pad_token_id": 1, "projection_dim": 8},
        vision_config={**sizes, "image_size": 16, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(path)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(WORDS[0], 0), (WORDS[1], 1)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{WORDS[0]} $A {WORDS[1]}", special_tokens=ends
    )
    named = {"bos_token": WORDS[0], "eos_token": WORDS[1], "pad_token": WORDS[1]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(path)
    values = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}}
    values |= {"crop_size": {"height": 16, "width": 16}}
    (path / "preprocessor_config.json").write_text(json.dumps(values))
    return path


def save_aesthetics(path: Path, clip: Path) -> torch.nn.Module:
    """A scorer on an image encoder of the sizes of `clip`, whose image processor it takes."""
    from transformers import CLIPVisionConfig

    from dit_accel.scorers.image_scorers import AestheticsModel

    config = CLIPVisionConfig.from_pretrained(clip)
    config.projection_dim = 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AestheticsModel(config).eval()
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text((clip / "preprocessor_config.json").read_text())
    return model
