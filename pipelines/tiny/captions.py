"""Captions of scenes, and the word-level tokenizer that reads them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .scenes import BACKGROUNDS, COLOURS, MOTIONS, POSITIONS, SHAPES, Scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATES = (
    "a {colour} {shape}{motion} at the {position} on a {background} background",
    "a {colour} {shape}{motion} in the {position} of a {background} background",
    "{colour} {shape}{motion}, {position}, {background} background",
    "on a {background} background, a {colour} {shape}{motion} at the {position}",
    "a {background} background with a {colour} {shape}{motion} in the {position}",
)
SYNONYMS: Mapping[str, str] = {
    "circle": "disc",
    "square": "box",
    "cross": "plus",
    "center": "middle",
    "striped": "stripy",
    "checkered": "checked",
    "plain": "grey",
    "purple": "violet",
}
EXTRA_WORDS = (
    *("an", "and", "are", "big", "image", "is", "moving", "object", "of"),
    *("one", "photo", "picture", "shape", "small", "the", "to", "video", "with"),
)
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # in this order: ids 0, 1 and 2


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describes ``scene``: in canonical words, or with ``rng`` in a paraphrase drawn from it."""
    words = scene.attributes
    template = TEMPLATES[0]
    if rng is not None:
        template = rng.choice(TEMPLATES)
        words = {
            name: SYNONYMS[word] if word in SYNONYMS and rng.random() < 0.1 else word
            for name, word in words.items()
        }
    motion = f" moving {words['motion']}" if scene.motion else ""
    return template.format(**{**words, "motion": motion})


def vocabulary() -> list[str]:
    """Every word the models know, special tokens first, in a fixed order."""
    text = " ".join((*TEMPLATES, *COLOURS, *SHAPES, *POSITIONS, *BACKGROUNDS, *MOTIONS, *SYNONYMS.values()))
    words = {word.strip(",") for word in text.split() if "{" not in word}
    return [*SPECIAL_TOKENS, *sorted(words | set(EXTRA_WORDS))]


def tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer: ``</s>`` ends each text, ``<unk>`` stands for unknown words."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast as Fast

    pad, end, unknown = SPECIAL_TOKENS
    words = {word: index for index, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(words, unk_token=unknown))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9 ]+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, words[end])]
    )
    return Fast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        model_max_length=max_length,
        padding_side="right",
    )
