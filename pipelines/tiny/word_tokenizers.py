"""The word-level tokenizers that read captions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = PAD, END, UNKNOWN = ("<pad>", "</s>", "<unk>")  # in this order: ids 0, 1 and 2
CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _backend(words: Iterable[str]) -> Tokenizer:
    """A word-level tokenizer that lower-cases and drops punctuation; nothing is added to a text yet."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    ids = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9 ]+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _fast(backend: Tokenizer, max_length: int, **special: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast as Fast

    names = {"pad_token": PAD, "unk_token": UNKNOWN, **special}
    return Fast(tokenizer_object=backend, model_max_length=max_length, padding_side="right", **names)


def tokenizer(words: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer of ``words``: ``</s>`` ends each text, ``<unk>`` stands for other words."""
    from tokenizers import processors

    backend = _backend(words)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, backend.token_to_id(END))]
    )
    return _fast(backend, max_length, eos_token=END)


def chat_tokenizer(
    words: Iterable[str], max_length: int, prefix: str, prefix_length: int
) -> PreTrainedTokenizerFast:
    """The same words between Llama 3's chat marks, for pipelines that write prompts into a template.

    Args:
        words: What it knows.
        max_length: Of a text, the template included.
        prefix: What the template has before the prompt.
        prefix_length: Tokens that the pipeline takes ``prefix`` for and crops.

    The words of ``prefix`` are fewer here than Llama's tokenizer makes of them; repeated begin marks make up
    for the rest. Texts end with the template's own mark.

    Raises:
        ValueError: ``prefix`` alone is longer than ``prefix_length``.
    """
    from tokenizers import AddedToken, processors

    backend = _backend(words)
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
