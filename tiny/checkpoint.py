"""Writes the tiny checkpoint: the released layout and schema at a few MB, the same bytes on every
machine.

It loads in transformers and in vLLM like the 12B: all three kinds of mixer, two attention layers,
RADIO tower, projector, tokenizer with the special tokens, chat template with /think and /no_think.
Its weights are those of tiny/weights/model.safetensors, which `tiny.training.train` trains.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from checkpoint.atomic import replaced_directory, write_tensors
from checkpoint.config import CheckpointConfig, read_config, read_json
from checkpoint.faults import BadInput, Fault
from checkpoint.layout import TensorSpec, expected_tensors
from checkpoint.other_weights import SINGLE
from tiny.tokenizer import write_tiny_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
"""Holds config.json and model.safetensors."""


def write_tiny(out: str | Path, seed: int = 0, trained: bool = True) -> CheckpointConfig:
    """Write the tiny checkpoint and return its configuration.

    Args:
        out: Directory to write.
        seed: Of the untrained weights.
        trained: Whether to take the trained weights; otherwise they are random.

    Raises:
        BadInput: When `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise BadInput(Fault(str(out), "exists already", "remove it, or give another output"))
    config = CheckpointConfig(out, read_json(WEIGHTS / "config.json"))
    with replaced_directory(out) as partial:
        shutil.copyfile(WEIGHTS / "config.json", partial / "config.json")
        write_tiny_tokenizer(partial, config)
        if trained:
            shutil.copyfile(WEIGHTS / SINGLE, partial / SINGLE)
        else:
            write_tensors(partial / SINGLE, _untrained_tensors(config, seed))
    return config


def tiny_checkpoint(directory: Path) -> CheckpointConfig:
    """Return the tiny checkpoint at `directory`; write it if it is not there or another version
    wrote it. Several processes may ask for it at once.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.fresh")
    with _one_at_a_time(directory.parent):
        shutil.rmtree(fresh, ignore_errors=True)
        write_tiny(fresh)
        if _has_files_of(directory, fresh):
            shutil.rmtree(fresh)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            fresh.rename(directory)
    return read_config(directory)


def _has_files_of(directory: Path, fresh: Path) -> bool:
    """Return whether a directory has all files of another, with the same bytes."""
    if not directory.is_dir():
        return False
    names = os.listdir(fresh)
    same, _, _ = filecmp.cmpfiles(fresh, directory, names, shallow=False)
    return same == names


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Let the processes that use a directory run a `with` block one after another."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _untrained_tensors(config: CheckpointConfig, seed: int) -> dict[str, torch.Tensor]:
    # NumPy guarantees that the streams of RandomState never change, so the bytes are the same on
    # every machine.
    random = np.random.RandomState(seed)
    return {name: _untrained(name, spec, random) for name, spec in expected_tensors(config).items()}


def _untrained(name: str, spec: TensorSpec, random: np.random.RandomState) -> torch.Tensor:
    """Draw one tensor, scaled so that activations stay of order one; Mamba's decay and step size in
    usual ranges.
    """
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    shape = spec.shape
    is_vector = len(shape) == 1
    if spec.dtype == "I64":
        return torch.arange(shape[0], dtype=torch.int64)
    if last == "A_log":
        values = np.log(random.uniform(1.0, 16.0, shape))
    elif last == "dt_bias":
        step = np.exp(random.uniform(np.log(0.001), np.log(0.1), shape))
        values = step + np.log(-np.expm1(-step))  # inverse of softplus
    elif last == "D" or (is_vector and not last.endswith("bias")):
        values = 1.0 + 0.1 * random.standard_normal(shape)
    elif last in ("token", "pos_embed", "embeddings"):
        values = 0.5 * random.standard_normal(shape)
    else:
        fan_in = 2500 if is_vector else int(np.prod(shape[1:]))
        values = random.standard_normal(shape) / np.sqrt(fan_in)
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
