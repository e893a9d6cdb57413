"""A checkpoint directory, opened once: its config, the headers of its weights, its tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from checkpoint.companions import Companions, companion_faults, find_companions
from checkpoint.config import CheckpointConfig, bf16_faults, is_quantized, read_config
from checkpoint.faults import BadInput, Fault, raise_if_any, shortened
from checkpoint.files import TensorFiles, layout_faults
from checkpoint.hashing import digests_of_finite
from checkpoint.layout import Linear, Specs, expected_tensors, language_model_linears
from checkpoint.other_weights import MERGE, ambiguous_weights
from checkpoint.reading import tokenizer_faults

_ADAPTER = re.compile(
    r"\.(lora_\w+|base_layer|modules_to_save|ia3_\w+|vera_\w+|hada_\w+|lokr_\w+|oft_\w+)(\.|$)"
)
"""Parts of the names that PEFT gives the tensors of an adapter."""

_WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "module.",
    "base_model.model.",
    "base_model.",
    "model.",
)
"""What torch.compile, FSDP, DDP and PEFT put into the names of a model that they wrap."""

_MANY = 20
"""Wrong tensors that are named one by one; more are one fault."""

_FEW = 3
"""Unknown tensors that are named one by one."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, BF16 or quantized; the rooms hand it on instead of opening it again.

    Attributes:
        config: Its configuration.
        tensors: Its weight files.
    """

    config: CheckpointConfig
    tensors: TensorFiles

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.config.directory

    @cached_property
    def layout(self) -> Specs:
        """Every tensor of a BF16 checkpoint with this config, in the order of the model."""
        return expected_tensors(self.config)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer of the language model's blocks, in order."""
        return tuple(language_model_linears(self.config))

    @cached_property
    def companions(self) -> Companions:
        """The files beside the weights as they are at the first look.

        Raises:
            BadInput: One of them must not or cannot be read.
        """
        return find_companions(self.directory, tuple(self.tensors.files))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer with its chat template.

        Raises:
            BadInput: There is none, or it lacks the special tokens that prompts consist of.
        """
        return load_tokenizer(self.config)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a checkpoint directory, BF16 or quantized.

    What is not quantized is BF16, or is rounded to it as it is read: fine-tuning saves float32.

    Raises:
        BadInput: It is not a checkpoint, or a weight file is missing or corrupt.
    """
    return _open(read_config(directory))


def _open(config: CheckpointConfig) -> Checkpoint:
    """Open the weights of a checkpoint whose configuration has been read."""
    checkpoint = Checkpoint(config, TensorFiles(config.directory))
    if not is_quantized(config.raw):
        checkpoint.tensors.round_to_bf16(checkpoint.layout)
    return checkpoint


def open_bf16(directory: str | Path) -> Checkpoint:
    """Open a BF16 checkpoint and check that its tensors are those of its config.

    Weights in float32 or float16 are rounded to BF16 as they are read.

    Raises:
        BadInput: With every fault found; also when it is quantized.
    """
    config = read_config(directory)
    raise_if_any(bf16_faults(config))
    checkpoint = _open(config)
    raise_if_any(ambiguous_weights(config.directory, checkpoint.tensors.files))
    raise_if_any(naming_faults(checkpoint))
    optional = config.family.optional_tensors
    found = checkpoint.tensors.specs
    faults = layout_faults(found, checkpoint.layout, str(config.directory), optional)
    raise_if_any(_summed_up(faults, checkpoint))
    return checkpoint


def _summed_up(faults: list[Fault], checkpoint: Checkpoint) -> list[Fault]:
    """The faults of a layout; those of many tensors that have the same cause, as one.

    A checkpoint of another class, or without the vision tower, would fill the screen.
    """
    if len(faults) <= _MANY:
        return faults
    found = checkpoint.tensors.specs
    expected = checkpoint.layout
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    others = [name for name in found if name in expected and found[name] != expected[name]]
    parts = []
    for names, what in ((missing, "missing"), (unknown, "not part of this architecture")):
        if names:
            parts.append(f"{len(names)} tensors are {what}, such as {shortened(names[0])}")
    if others:
        name = others[0]
        is_now = f"{found[name].dtype} {list(found[name].shape)}"
        wanted = f"{expected[name].dtype} {list(expected[name].shape)}"
        parts.append(f"{len(others)} tensors differ: {shortened(name)} is {is_now}, not {wanted}")
    remedy = "save it with the class that loaded the released checkpoint"
    return [Fault(str(checkpoint.directory), "; ".join(parts), remedy)]


def rounding_note(checkpoint: Checkpoint) -> str | None:
    """Return what to say about weights that are rounded to BF16; None when all are BF16."""
    tensors = checkpoint.tensors
    if not tensors.rounded:
        return None
    counts = Counter(tensors.stored[name].dtype for name in tensors.rounded)
    found = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(counts.items()))
    total = f"{len(tensors.rounded)} of {len(tensors.specs)} tensors"
    return f"{checkpoint.directory}: {total} are not BF16 and are rounded to it ({found})"


def check_companions(checkpoint: Checkpoint) -> None:
    """Check the files beside the weights, and remember their content for the export.

    Raises:
        BadInput: With every one that is missing, damaged or must not be read.
    """
    raise_if_any(companion_faults(checkpoint.directory))
    _ = checkpoint.companions


def naming_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Yield one fault for what fine-tuning does to all tensors of a checkpoint at once."""
    where = str(checkpoint.directory)
    found = checkpoint.tensors.specs
    expected = checkpoint.layout
    adapter = next((name for name in found if _ADAPTER.search(name)), None)
    if adapter is not None:
        what = f"contains an adapter that is not merged, such as {shortened(adapter)}"
        yield Fault(where, what, MERGE)
        return
    wrapper = _wrapper(found, expected)
    if wrapper is not None:
        what = f"tensor names contain {wrapper!r}, which the release's do not"
        yield Fault(where, what, "save the model that is inside the wrapper")
        return


def _wrapper(found: Specs, expected: Specs) -> str | None:
    """The text in front of, or inside, most names that makes them others than the release's."""
    unknown = [name for name in found if name not in expected]
    if len(unknown) <= _FEW:
        return None
    candidates = list(_WRAPPERS)
    last = f"{next(iter(expected))}"
    for name in unknown:
        if name.endswith(last):
            candidates.insert(0, name.removesuffix(last))
    for wrapper in candidates:
        known = sum(name.replace(wrapper, "") in expected for name in unknown) if wrapper else 0
        if known > len(unknown) // 2:
            return wrapper
    return None


def check_finite(checkpoint: Checkpoint) -> dict[str, str]:
    """Read every weight once and refuse NaN and infinity.

    Returns:
        SHA-256 of every weight file, for the manifest.

    Raises:
        BadInput: With every tensor that contains any.
    """
    return digests_of_finite(checkpoint.tensors)


def load_tokenizer(config: CheckpointConfig) -> PreTrainedTokenizerFast:
    """Load tokenizer.json and the chat template of the directory.

    Raises:
        BadInput: There is no tokenizer, its files cannot be read, or it lacks the special tokens
            that prompts consist of.
    """
    path = config.directory / "tokenizer.json"
    if not path.exists():
        raise BadInput(Fault(str(path), "no such file", "copy the tokenizer files"))
    raise_if_any(tokenizer_faults(config.directory))
    # AutoTokenizer would import the directory's Python files to find the config class.
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(config.directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain exceptions
        what = f"is not a tokenizer: {shortened(error)}"
        raise BadInput(Fault(str(path), what, "copy the tokenizer files")) from None
    token = config.raw["img_context_token"]
    expected = config.image_token_id
    found = tokenizer.convert_tokens_to_ids(token)
    if found != expected:
        what = f"{token} has id {found}, img_context_token_id in config.json is {expected}"
        raise BadInput(Fault(str(path), what, "copy tokenizer and config.json from one release"))
    last, number = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    rows = config.text["vocab_size"]
    if number >= rows:
        what = f"{shortened(last, 60)} has id {number}, and the embeddings have {rows} rows"
        raise BadInput(Fault(str(path), what, "resize the embeddings to the tokenizer, or copy it"))
    return tokenizer
