"""A checkpoint directory, opened once: its config, the headers of its weights, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from checkpoint.config import CheckpointConfig, read_config
from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.files import TensorFiles, layout_faults, nonfinite_faults
from checkpoint.layout import Linear, Specs, expected_tensors, language_model_linears


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
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer with its chat template.

        Raises:
            BadInput: There is none, or it lacks the special tokens that prompts consist of.
        """
        return load_tokenizer(self.config)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a checkpoint directory, BF16 or quantized.

    Raises:
        BadInput: It is not a checkpoint, or a weight file is missing or corrupt.
    """
    return Checkpoint(read_config(directory), TensorFiles(directory))


def open_bf16(directory: str | Path) -> Checkpoint:
    """Open a BF16 checkpoint and check that its tensors are those of its config.

    Raises:
        BadInput: With every fault found; also when it is quantized.
    """
    config = read_config(directory)
    if "quantization_config" in config.raw:
        what = "is quantized already"
        raise BadInput(Fault(str(config.directory), what, "give the BF16 checkpoint"))
    checkpoint = Checkpoint(config, TensorFiles(directory))
    optional = config.family.optional_tensors
    found = checkpoint.tensors.specs
    raise_if_any(layout_faults(found, checkpoint.layout, str(config.directory), optional))
    return checkpoint


def check_finite(checkpoint: Checkpoint) -> None:
    """Read every weight once and refuse NaN and infinity.

    Raises:
        BadInput: With every tensor that contains any.
    """
    raise_if_any(nonfinite_faults(checkpoint.tensors))


def load_tokenizer(config: CheckpointConfig) -> PreTrainedTokenizerFast:
    """Load tokenizer.json and the chat template of the directory.

    Raises:
        BadInput: There is no tokenizer, or it lacks the special tokens that prompts consist of.
    """
    path = config.directory / "tokenizer.json"
    if not path.exists():
        raise BadInput(Fault(str(path), "no such file", "copy the tokenizer files"))
    # AutoTokenizer would import the directory's Python files to find the config class.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.directory, local_files_only=True)
    token = config.raw["img_context_token"]
    expected = config.image_token_id
    found = tokenizer.convert_tokens_to_ids(token)
    if found != expected:
        what = f"{token} has id {found}, in config.json it has {expected}"
        raise BadInput(Fault(str(path), what, "copy tokenizer and config.json from one release"))
    return tokenizer
