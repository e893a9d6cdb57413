"""Builds the embedded checkpoint's tokenizer: byte-level BPE with whole-word merges, and the special tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# As in the release: <s> 1, </s> 2, role markers 10 and 11, end of turn 12; the visual tokens stand behind the text.
SPECIALS = ["<unk>", "<s>", "</s>"] + [f"<SPECIAL_{i}>" for i in range(3, 16)]
VISUAL = ["<image>", "<img>", "</img>", "<video>"]

# Words that every prompt repeats get a token each; codes, digits and rare words stay bytes, as the tasks need them.
_WORDS = """
 Frame frame sampled at seconds System User Assistant think the a an of in is it to and on or with for from that this
 what which who how many read write answer only one word page image images video clip picture document chart table bar
 bars largest smallest value code text number color colour shows show changes change appears happened digit letter name
 city first second third last before after line red green blue yellow purple orange white black gray brown pink cyan
 circle square triangle star cross note total order date invoice report item items price quantity remember find key
 list following each was are be has
""".split()


def build_tokenizer(vocab_size: int, first_visual: int | None = None) -> Tokenizer:
    """Build the tokenizer.

    Args:
        vocab_size: Upper bound.
        first_visual: Id of `<image>`; the other visual tokens follow. Right after the text tokens by default; a larger
            one leaves fillers between that no text becomes.

    Raises:
        ValueError: When the tokens do not fit.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIALS + alphabet)}
    merges: list[tuple[str, str]] = []
    # Ġ is the byte-level alphabet's space. Spaced words come first: merges apply in order, and a word that had merged
    # without its space could not take it up again.
    for spelled in ["Ġ" + word for word in _WORDS] + _WORDS:
        for end in range(2, len(spelled) + 1):
            left, right = spelled[: end - 1], spelled[end - 1]
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    for index in range(len(vocab), first_visual or 0):
        vocab[f"<filler_{index}>"] = index
    if len(vocab) + len(VISUAL) > vocab_size:
        raise ValueError(f"{len(vocab) + len(VISUAL)} tokens do not fit a vocabulary of {vocab_size}")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS + VISUAL])
    return tokenizer
