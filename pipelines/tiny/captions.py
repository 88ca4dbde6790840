"""Captions of scenes, and the word-level tokenizer that reads them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .scenes import BACKGROUNDS, COLOURS, MOTIONS, POSITIONS, SHAPES, Scene

if TYPE_CHECKING:
    from tokenizers import Tokenizer
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
SPECIAL_TOKENS = PAD, END, UNKNOWN = ("<pad>", "</s>", "<unk>")  # in this order: ids 0, 1 and 2
CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


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


def _backend() -> Tokenizer:
    """A word-level tokenizer that lower-cases and drops punctuation; nothing is added to a text yet."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = {word: index for index, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9 ]+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _fast(backend: Tokenizer, max_length: int, **special: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast as Fast

    names = {"pad_token": PAD, "unk_token": UNKNOWN, **special}
    return Fast(tokenizer_object=backend, model_max_length=max_length, padding_side="right", **names)


def tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer: ``</s>`` ends each text, ``<unk>`` stands for unknown words."""
    from tokenizers import processors

    backend = _backend()
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, backend.token_to_id(END))]
    )
    return _fast(backend, max_length, eos_token=END)


def chat_tokenizer(max_length: int, prefix: str, prefix_length: int) -> PreTrainedTokenizerFast:
    """The same words between Llama 3's chat marks, for pipelines that write prompts into a template.

    Args:
        max_length: Of a text, the template included.
        prefix: What the template has before the prompt.
        prefix_length: Tokens that the pipeline takes ``prefix`` for and crops.

    The words of ``prefix`` are fewer here than Llama's tokenizer makes of them; repeated begin marks make up
    for the rest. Texts end with the template's own mark.

    Raises:
        ValueError: ``prefix`` alone is longer than ``prefix_length``.
    """
    from tokenizers import AddedToken, processors

    backend = _backend()
    backend.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in CHAT_TOKENS])
    missing = prefix_length - len(backend.encode(prefix).ids)
    if missing < 1:
        raise ValueError(
            f"`prefix` must leave room for a begin mark in {prefix_length} tokens, "
            f"and has {prefix_length - missing}"
        )
    begin, *_, end = CHAT_TOKENS
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*[begin] * missing, "$A"]), special_tokens=[(begin, backend.token_to_id(begin))]
    )
    return _fast(backend, max_length, bos_token=begin, eos_token=end)
