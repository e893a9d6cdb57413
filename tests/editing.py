"""Changes a checkpoint directory in a test: one tensor, one JSON file, one file's length."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edit_tensors(
    directory: Path, change: Callable[[dict], None], file: str = "model.safetensors"
) -> None:
    """Load all tensors of a file, let `change` alter the dictionary, write it back."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / file).items()}
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    """Load a JSON file, let `change` alter it, write it back."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file off."""
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * keep))


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, for comparisons that no rounding or NaN can blur."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
