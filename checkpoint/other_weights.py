"""Names of files that hold weights: those that are read, and what a directory holds in their place.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from checkpoint.faults import Fault, shortened

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
"""What PEFT writes; transformers loads it on top of the weights beside it."""

MERGE = "merge it into the model with PEFT's merge_and_unload(), then save_pretrained()"
"""The remedy of an adapter in place of a model."""

OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".pkl",
    ".npz",
)
"""How names of files end that hold weights and are not safetensors."""

_SAVE = "save the model again with save_pretrained(…, safe_serialization=True)"


def found_instead(directory: Path) -> tuple[str, str] | None:
    """Return the names of a directory's other weights, and the remedy; None if there are none."""
    names = [path.name for path in sorted(directory.iterdir())]
    adapters = [name for name in names if name in ADAPTER]
    if adapters:
        return shortened(", ".join(adapters)), f"it is an adapter: {MERGE}"
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return shortened(", ".join(shards)), f"copy {INDEX} as well, which says what is where"
    others = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    if not others:
        return None
    if any(name.endswith(".gguf") for name in others):
        return shortened(", ".join(others)), "give the checkpoint that the GGUF file was made from"
    return shortened(", ".join(others)), _SAVE


def no_weights(directory: Path) -> Fault:
    """Return what is wrong with a directory without safetensors, by what it holds instead."""
    what = f"contains neither {INDEX} nor {SINGLE}"
    instead = found_instead(directory)
    if instead is None:
        return Fault(str(directory), what, "copy the weights")
    names, remedy = instead
    return Fault(str(directory), f"{what}, but {names}", remedy)


def ambiguous_weights(directory: Path, files: Collection[str]) -> Iterator[Fault]:
    """Yield a fault for each file that some loaders take for weights of the model, and we do not.

    transformers prefers `model.safetensors` to an index and adds an adapter to the weights; vLLM
    loads every safetensors file where there is no index.

    Args:
        directory: A checkpoint.
        files: Names of the weight files that are read.
    """
    for path in sorted(directory.glob("*.safetensors")):
        if path.name in files:
            continue
        if path.name in ADAPTER:
            what = "is an adapter beside the weights, and would be left out"
            yield Fault(str(path), what, f"{MERGE}; or move it away")
        elif path.name == SINGLE or SINGLE in files:
            other = INDEX if path.name == SINGLE else SINGLE
            what = f"lies beside {other}, and loaders differ in what they read"
            yield Fault(str(path), what, "move away the one that is not the model")
