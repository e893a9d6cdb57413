"""Writes the quantized checkpoint from the source's files: quantized tensors replaced, everything
else bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from tqdm import tqdm

from checkpoint.atomic import write_json
from checkpoint.files import Reader
from checkpoint.opened import Checkpoint
from checkpoint.shards import ShardWriter, plan_shards, write_index
from export.layout import output_specs
from export.manifest import Manifest, write_manifest
from export.matching import exclude_list
from quantize.formats.registry import FORMATS, UNQUANTIZED, find_format
from quantize.policy import Policy

_KV_CACHE_ALGOS = {"fp8": "FP8", None: None}
"""`kv_cache_quant_algo` by the name that recipes write."""


@contextlib.contextmanager
def open_writer(
    source: Checkpoint, policy: Policy, directory: Path, read: Reader | None = None
) -> Iterator[ShardWriter]:
    """Write the weight files of a quantized checkpoint: what is outside the layers is copied, while
    the caller puts the quantized tensors of each layer.

    Files that an earlier run has finished stay. Leaving the context waits until all is written.

    Args:
        source: The BF16 checkpoint.
        policy: Format by linear.
        directory: Where the files go.
        read: Returns a tensor that is not quantized; the source's when None.

    Raises:
        OSError: The disk is full.
    """
    shards = plan_shards(output_specs(source, policy), source.config.family)
    total = shards.total_bytes
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=None) as progress:
        with ShardWriter(directory, shards, read or source.tensors.read, progress.update) as writer:
            yield writer


def write_companions(
    source: Checkpoint, policy: Policy, directory: Path, manifest: Manifest
) -> None:
    """Write everything beside the weights: index, configs, the source's other files, manifest."""
    source.companions.copy_to(directory)
    write_index(plan_shards(output_specs(source, policy), source.config.family), directory)
    legacy = quantization_config(policy)
    write_json(directory / "hf_quant_config.json", legacy)
    config = dict(source.config.raw)
    config["quantization_config"] = convert_hf_quant_config_format(legacy)
    write_json(directory / "config.json", config)
    write_manifest(directory, manifest)


def quantization_config(policy: Policy) -> dict[str, Any]:
    """Return the content of hf_quant_config.json: algorithm, KV cache, group size, exclude list."""
    unquantized = [name for name, format in policy.formats.items() if format == UNQUANTIZED]
    section: dict[str, Any] = {
        "quant_algo": policy.algo,
        "kv_cache_quant_algo": _KV_CACHE_ALGOS[policy.kv_cache],
        "exclude_modules": exclude_list(unquantized, policy.family),
    }
    format = find_format(policy.algo)
    if format is None:
        layers = {name: FORMATS[used].config_entry for name, used in policy.quantized.items()}
        section["quantized_layers"] = layers
    else:
        section.update(format.config_entry)
    producer = {"name": "modelopt", "version": modelopt.__version__}
    return {"producer": producer, "quantization": section}
