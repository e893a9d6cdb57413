"""Builds a tokenizer for checkpoints that are made here.

Byte-level BPE with a few whole words and the released special tokens.
The released tokenizer cannot be shipped. This one has the same special tokens at the same places,
so prompts are built from it in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from checkpoint.atomic import write_json
from checkpoint.config import CheckpointConfig

RELEASED = Path(__file__).parent / "released"
"""The released config.json, and the Python file and chat template that checkpoints made here carry.
"""

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"] + [f"<SPECIAL_{number}>" for number in range(3, 16)]
"""As in the release: <s> 1, </s> 2, role markers 10 and 11, end of turn 12."""

VISUAL_TOKENS = ["<image>", "<img>", "</img>", "<video>"]
"""Their ids follow those of the text tokens, as in the release."""

PROMPT_WORDS = [
    "Frame",
    "frame",
    "sampled",
    "at",
    "seconds",
    "System",
    "User",
    "Assistant",
    "think",
]
"""Words that every prompt repeats."""

_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<SPECIAL_12>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}
_GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 12, "do_sample": False}


def build_tokenizer(
    vocab_size: int, words: Sequence[str], first_visual: int | None = None
) -> Tokenizer:
    """Build a byte-level BPE tokenizer in which each of `words` is one token.

    Args:
        vocab_size: Upper bound on the number of tokens.
        words: Words that get their own token, with and without a space before them.
        first_visual: Id of `<image>`; the other visual tokens follow. By default they come right
            after the text tokens; a larger id leaves filler tokens between, which no text is
            encoded to.

    Raises:
        ValueError: When the tokens do not fit into `vocab_size`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS + alphabet)}
    merges: list[tuple[str, str]] = []
    # "Ġ" is the byte-level alphabet's space. Merges apply in order, so words with a space come
    # first: a word that has been merged without its space could not take it up afterwards.
    spellings = ["Ġ" + word for word in words] + list(words)
    for spelling in spellings:
        for end in range(2, len(spelling) + 1):
            left = spelling[: end - 1]
            right = spelling[end - 1]
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    for index in range(len(vocab), first_visual or 0):
        vocab[f"<filler_{index}>"] = index
    needed = len(vocab) + len(VISUAL_TOKENS)
    if needed > vocab_size:
        raise ValueError(f"{needed} tokens do not fit a vocabulary of {vocab_size}")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = SPECIAL_TOKENS + VISUAL_TOKENS
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def write_tokenizer(
    directory: Path, config: CheckpointConfig, words: Sequence[str] = PROMPT_WORDS
) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the Python file of
    the auto_map.

    Args:
        directory: The checkpoint directory.
        config: Its config; gives the vocabulary size and the id of `<image>`.
        words: As in `build_tokenizer`.
    """
    tokenizer = build_tokenizer(config.text["vocab_size"], words, config.image_token_id)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (RELEASED / "chat_template.jinja").read_text(encoding="utf-8")
    settings = _TOKENIZER_CONFIG | {
        "chat_template": template,
        "model_max_length": config.max_length,
    }
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "generation_config.json", _GENERATION_CONFIG)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    configuration = (RELEASED / "configuration.py").read_text(encoding="utf-8")
    (directory / "configuration.py").write_text(configuration, encoding="utf-8")
