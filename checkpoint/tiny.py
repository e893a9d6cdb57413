"""Writes the embedded checkpoint: the released layout and schema at a few MB, deterministic byte for byte.

    python -m checkpoint.tiny OUT [--untrained]

OUT then loads in transformers and in vLLM like the 12B: all three mixer kinds, two attention layers, RADIO tower,
projector, tokenizer with the special tokens, chat template with /think and /no_think. Its weights are those of
checkpoint/embedded/model.safetensors, which `accuracy.train_tiny` trains; without that file they are random.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from checkpoint.config import CheckpointConfig, read_config, read_json
from checkpoint.faults import BadInput, Fault, main
from checkpoint.files import SINGLE
from checkpoint.layout import TensorSpec, expected_tensors
from checkpoint.tokenizer import build_tokenizer
from checkpoint.writing import finished_directory, save_tensors

EMBEDDED = Path(__file__).parent / "embedded"

_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<SPECIAL_12>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}


def write_tiny(out: str | Path, seed: int = 0, trained: bool = True) -> CheckpointConfig:
    """Write the embedded checkpoint and return its configuration.

    Args:
        out: Directory to write.
        seed: Of the untrained weights.
        trained: Take the weights that `accuracy.train_tiny` made, where they are there.

    Raises:
        BadInput: When `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise BadInput(Fault(str(out), "exists already", "remove it or give another output"))
    config = CheckpointConfig(out, read_json(EMBEDDED / "config.json"))
    with finished_directory(out) as partial:
        for file in sorted(EMBEDDED.iterdir()):
            if file.is_file() and (trained or file.name != SINGLE):
                shutil.copyfile(file, partial / file.name)
        write_tokenizer(partial, config)
        if not (partial / SINGLE).exists():
            # RandomState's streams are frozen by NumPy's policy, so the bytes are the same on every machine.
            random = np.random.RandomState(seed)
            tensors = {name: _untrained(name, spec, random) for name, spec in expected_tensors(config).items()}
            save_tensors(tensors, partial / SINGLE)
    return config


def write_tokenizer(directory: Path, config: CheckpointConfig) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json for a config's vocabulary."""
    build_tokenizer(config.text["vocab_size"], config.image_token_id).save(str(directory / "tokenizer.json"))
    template = (EMBEDDED / "chat_template.jinja").read_text(encoding="utf-8")
    settings = _TOKENIZER_CONFIG | {"chat_template": template, "model_max_length": config.max_length}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 12, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def embedded_checkpoint(directory: Path) -> CheckpointConfig:
    """The embedded checkpoint at `directory`, written when it is not there or was written by another version."""
    fresh = directory.with_name(f".{directory.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    write_tiny(fresh)
    names = os.listdir(fresh)
    if directory.is_dir() and filecmp.cmpfiles(fresh, directory, names, shallow=False)[0] == names:
        shutil.rmtree(fresh)
    else:
        shutil.rmtree(directory, ignore_errors=True)
        fresh.rename(directory)
    return read_config(directory)


def _untrained(name: str, spec: TensorSpec, random: np.random.RandomState) -> torch.Tensor:
    """Weights scaled so that a forward stays of order one; Mamba's decay and step size in their usual ranges."""
    last, shape = name.removesuffix(".weight").rsplit(".", 1)[-1], spec.shape
    if spec.dtype == "I64":
        return torch.arange(shape[0], dtype=torch.int64)
    if last == "A_log":
        values = np.log(random.uniform(1.0, 16.0, shape))
    elif last == "dt_bias":
        step = np.exp(random.uniform(np.log(0.001), np.log(0.1), shape))
        values = step + np.log(-np.expm1(-step))  # inverse of softplus
    elif last == "D" or (len(shape) == 1 and not last.endswith("bias")):
        values = 1.0 + 0.1 * random.standard_normal(shape)
    elif last in ("token", "pos_embed", "embeddings"):
        values = 0.5 * random.standard_normal(shape)
    else:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 2500
        values = random.standard_normal(shape) / np.sqrt(fan_in)
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)


def _run() -> int:
    parser = argparse.ArgumentParser(prog="python -m checkpoint.tiny", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist")
    parser.add_argument("--untrained", action="store_true", help="random weights instead of the trained ones")
    given = parser.parse_args()
    config = write_tiny(given.out, trained=not given.untrained)
    size = (config.directory / SINGLE).stat().st_size / 1e6
    print(f"{config.directory}: {len(config.pattern)} layers, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    main(_run)
