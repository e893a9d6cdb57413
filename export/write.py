"""Writes the quantized checkpoint from the source's files: quantized tensors replaced, everything
else bit for bit.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from tqdm import tqdm

from checkpoint.atomic import check_output, replaced_directory, write_json
from checkpoint.config import CheckpointConfig
from checkpoint.files import INDEX
from checkpoint.layout import (
    Specs,
    TensorSpec,
    expected_tensors,
    language_model_linears,
    spec_bytes,
)
from checkpoint.opened import Checkpoint
from checkpoint.shards import Shards, Writer
from export.layout import KV_SCALE, kv_scale_name, packed_specs
from export.manifest import MANIFEST, Manifest, write_manifest
from export.matching import exclude_list
from quantize.formats.registry import FORMATS, UNQUANTIZED, find_format
from quantize.policy import Policy
from quantize.ptq import PackedLinear

SHARD_BYTES = 5_000_000_000
_OURS = ("config.json", "hf_quant_config.json", MANIFEST, INDEX)
_KV_CACHE_ALGOS = {"fp8": "FP8", None: None}
"""`kv_cache_quant_algo` by the name that recipes write."""


def output_specs(
    config: CheckpointConfig, policy: Policy, source: Specs
) -> dict[str, TensorSpec]:
    """Return name, shape and dtype of every tensor of the quantized checkpoint, before anything is
    computed.

    Args:
        config: The source's configuration.
        policy: Format by linear.
        source: The tensors that the source has; optional ones are carried over.
    """
    linears = {linear.name: linear for linear in language_model_linears(config)}
    bf16 = expected_tensors(config)
    bf16.update(source)
    specs: dict[str, TensorSpec] = {}
    for name, spec in bf16.items():
        linear = linears.get(name.removesuffix(".weight"))
        format = UNQUANTIZED if linear is None else policy.formats.get(linear.name, UNQUANTIZED)
        if linear is None or format == UNQUANTIZED:
            specs[name] = spec
        else:
            specs.update(packed_specs(linear, format))
        if linear is not None and policy.kv_cache and linear.short in config.family.kv_linears:
            specs[kv_scale_name(linear, config.family)] = KV_SCALE
    return specs


def write_checkpoint(
    source: Checkpoint,
    policy: Policy,
    packed: Iterator[PackedLinear],
    output: Path,
    manifest: Manifest,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the quantized checkpoint beside `output` and rename it at the end.

    Args:
        source: The BF16 checkpoint.
        policy: Format by linear.
        packed: Quantized linears in the model's order; taken one by one as they are written.
        output: Directory to write; it must not exist.
        manifest: Written beside the weights.
        shard_bytes: Size of the largest shard.

    Raises:
        BadInput: The output exists or the disk is too small.
        OSError: Writing fails; nothing is left at `output`.
    """
    specs = output_specs(source.config, policy, source.tensors.specs)
    check_output(output, spec_bytes(specs))
    with replaced_directory(output) as partial:
        with open_writer(source, policy, partial, shard_bytes) as writer:
            for linear in packed:
                writer.put(by_name(linear))
        missing = sorted(specs.keys() - writer.shards.written)
        if missing:
            raise AssertionError(f"not packed: {', '.join(missing)}")
        write_companions(source, policy, partial, manifest, shard_bytes)


@contextlib.contextmanager
def open_writer(
    source: Checkpoint, policy: Policy, directory: Path, shard_bytes: int = SHARD_BYTES
) -> Iterator[Writer]:
    """Lay out the weight files in `directory` and copy the tensors that are not quantized, while
    the caller puts those that are.

    What an earlier run has written there stays. Leaving the context waits until all of it is
    written.

    Raises:
        OSError: The disk is full.
    """
    found = source.tensors.specs
    specs = output_specs(source.config, policy, found)
    unchanged = [name for name, spec in specs.items() if found.get(name) == spec]
    shards = Shards(directory, specs, shard_bytes)
    shards.create()
    total = spec_bytes(specs)
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=None) as progress:
        with Writer(shards, progress.update) as writer:
            writer.copy(unchanged, source.tensors.read)
            yield writer


def by_name(linear: PackedLinear) -> dict[str, torch.Tensor]:
    """Return the tensors of a linear by the names they get on disk."""
    return {f"{linear.name}.{suffix}": tensor for suffix, tensor in linear.tensors.items()}


def write_companions(
    source: Checkpoint,
    policy: Policy,
    directory: Path,
    manifest: Manifest,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write everything beside the weights: index, configs, the source's other files, the manifest.
    """
    specs = output_specs(source.config, policy, source.tensors.specs)
    _copy_other_files(source.directory, directory)
    weight_map = Shards(directory, specs, shard_bytes).weight_map
    if len(set(weight_map.values())) > 1:
        metadata = {"total_size": spec_bytes(specs)}
        write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map})
    legacy = quantization_config(policy)
    write_json(directory / "hf_quant_config.json", legacy)
    config = dict(source.config.raw)
    config["quantization_config"] = _config_section(legacy)
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


def _config_section(legacy: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json for a content of hf_quant_config.json."""
    section: dict[str, Any] = convert_hf_quant_config_format(legacy)
    return section


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy what the source has besides weights and our own files: tokenizer, Python files,
    templates, processor settings, licence, those in its folders too.
    """
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if is_hidden or "__pycache__" in relative.parts or not file.is_file():
            continue
        if relative.suffix == ".safetensors" or str(relative) in _OURS:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / relative)
