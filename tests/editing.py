"""Changes a checkpoint directory in a test: one tensor, one JSON file, one file's length."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edit_tensors(directory: Path, change: Callable[[dict], None]) -> None:
    """Load all tensors of a directory, let `change` alter the dictionary, write them back.

    Each tensor stays in its file; new ones go into the first file. The index follows.
    """
    files = sorted(directory.glob("*.safetensors"))
    location = {}
    tensors = {}
    for file in files:
        for name, tensor in load_file(file).items():
            location[name] = file
            tensors[name] = tensor.clone()
    change(tensors)
    for file in files:
        own = {}
        for name, tensor in tensors.items():
            if location.get(name, files[0]) == file:
                own[name] = tensor
        save_file(own, file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = {name: location.get(name, files[0]).name for name in tensors}
        edit_json(index, lambda content: content.update(weight_map=weight_map))


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    """Load a JSON file, let `change` alter it, write it back."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def cast_weights(directory: Path, dtype: str, names: str = "") -> None:
    """Save the weights as fine-tuning does: of another dtype, at values that BF16 does not have.

    Args:
        directory: A checkpoint.
        dtype: torch's name of the dtype.
        names: What the names of the tensors begin with; all by default.
    """
    random = torch.Generator().manual_seed(0)

    def cast(tensors: dict) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and name.startswith(names):
                moved = 1 + 0.004 * torch.randn(tensor.shape, generator=random)
                tensors[name] = (tensor.float() * moved).to(getattr(torch, dtype))

    edit_tensors(directory, cast)


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file off."""
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * keep))


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, for comparisons that no rounding or NaN can blur."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
