"""Writes the quantized checkpoint from the source's files: quantized tensors replaced, everything
else bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import modelopt
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from tqdm import tqdm

from checkpoint.atomic import check_output, finished_directory
from checkpoint.config import CheckpointConfig
from checkpoint.files import INDEX, TensorFiles
from checkpoint.layout import TensorSpec, expected_tensors, language_model_linears, spec_bytes
from checkpoint.shards import Shards, Writer
from export.manifest import MANIFEST, Manifest, write_manifest
from export.matching import exclude_list
from quantize.formats.registry import FORMATS, NVFP4_BLOCK, UNQUANTIZED
from quantize.policy import Policy
from quantize.ptq import PackedLinear

SHARD_BYTES = 5_000_000_000
_OURS = ("config.json", "hf_quant_config.json", MANIFEST, INDEX)


def output_specs(
    config: CheckpointConfig, policy: Policy, source: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """Name, shape and dtype of every tensor of the quantized checkpoint, before anything is
    computed.

    Args:
        config: The source's configuration.
        policy: Format by linear.
        source: The tensors the source holds; optional ones are carried over.
    """
    specs: dict[str, TensorSpec] = {}
    linears = {linear.name: linear for linear in language_model_linears(config)}
    kinds = {linear.name: linear.short for linear in linears.values()}
    for name, spec in (dict(expected_tensors(config)) | dict(source)).items():
        linear = name.removesuffix(".weight")
        format = FORMATS.get(policy.formats.get(linear, UNQUANTIZED))
        if format:
            for suffix, packed in format.tensors(linears[linear].shape).items():
                specs[f"{linear}.{suffix}"] = packed
        else:
            specs[name] = spec
        if policy.kv_cache and kinds.get(linear) in ("k_proj", "v_proj"):
            specs[f"{linear}.{kinds[linear][0]}_scale"] = TensorSpec((), "F32")
    return specs


def write_checkpoint(
    config: CheckpointConfig,
    source: TensorFiles,
    policy: Policy,
    packed: Iterator[PackedLinear],
    output: Path,
    manifest: Manifest,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the quantized checkpoint beside `output` and rename it at the end.

    Args:
        config: The source's configuration.
        source: The source's tensors.
        policy: Format by linear.
        packed: Quantized linears in the model's order; taken one by one as they are written.
        output: Directory to write; must not exist.
        manifest: Written beside the weights.
        shard_bytes: Largest shard.

    Raises:
        BadInput: When the output exists or the disk is too small.
        OSError: When writing fails; nothing is left at `output`.
    """
    specs = output_specs(config, policy, source.specs)
    check_output(output, spec_bytes(specs))
    with finished_directory(output) as partial:
        with open_writer(config, source, policy, partial, shard_bytes) as writer:
            for linear in packed:
                writer.put(by_name(linear))
        if missing := sorted(specs.keys() - writer.shards.written):
            raise AssertionError(f"never came: {', '.join(missing)}")
        write_companions(config, policy, source, partial, manifest, shard_bytes)


@contextlib.contextmanager
def open_writer(
    config: CheckpointConfig,
    source: TensorFiles,
    policy: Policy,
    directory: Path,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[Writer]:
    """Lay out the weight files in `directory` and copy what is not quantized, while the caller puts
    what is.

    What an earlier run has put there stays. Leaving the context waits until all of it is written.

    Raises:
        OSError: When the disk is full.
    """
    specs = output_specs(config, policy, source.specs)
    shards = Shards(directory, specs, shard_bytes)
    shards.create()
    with tqdm(
        total=spec_bytes(specs), desc="writing", unit="B", unit_scale=True, disable=None
    ) as progress:
        with Writer(shards, progress.update) as writer:
            writer.copy(
                [name for name, spec in specs.items() if source.specs.get(name) == spec],
                source.read,
            )
            yield writer


def by_name(linear: PackedLinear) -> dict[str, torch.Tensor]:
    """The tensors of a linear by the names they get on disk."""
    return {f"{linear.name}.{suffix}": tensor for suffix, tensor in linear.tensors.items()}


def write_companions(
    config: CheckpointConfig,
    policy: Policy,
    source: TensorFiles,
    directory: Path,
    manifest: Manifest,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write everything beside the weights: index, configs, the source's other files, the manifest."""
    specs = output_specs(config, policy, source.specs)
    _copy_other_files(config.directory, directory)
    weight_map = Shards(directory, specs, shard_bytes).weight_map
    if len(set(weight_map.values())) > 1:
        _write_json(
            directory / INDEX,
            {"metadata": {"total_size": spec_bytes(specs)}, "weight_map": weight_map},
        )
    legacy = quantization_config(policy)
    _write_json(directory / "hf_quant_config.json", legacy)
    section = convert_hf_quant_config_format(legacy)
    _write_json(directory / "config.json", dict(config.raw) | {"quantization_config": section})
    write_manifest(directory, manifest)


def quantization_config(policy: Policy) -> dict[str, Any]:
    """The content of hf_quant_config.json: algorithm, KV cache, group size and exclude list."""
    section: dict[str, Any] = {
        "quant_algo": policy.algo,
        "kv_cache_quant_algo": "FP8" if policy.kv_cache == "fp8" else None,
        "exclude_modules": exclude_list(
            [n for n, format in policy.formats.items() if format == UNQUANTIZED]
        ),
    }
    if policy.algo == "NVFP4":
        section["group_size"] = NVFP4_BLOCK
    if policy.algo == "MIXED_PRECISION":
        section["quantized_layers"] = {
            name: {"quant_algo": FORMATS[format].algo}
            | ({"group_size": NVFP4_BLOCK} if format == "nvfp4" else {})
            for name, format in policy.quantized.items()
        }
    return {
        "producer": {"name": "modelopt", "version": modelopt.__version__},
        "quantization": section,
    }


def _copy_other_files(source: Path, target: Path) -> None:
    """Tokenizer, Python files, templates, processor settings, licence: whatever the source has, in
    its folders too.
    """
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if (
            not file.is_file()
            or hidden
            or relative.suffix == ".safetensors"
            or str(relative) in _OURS
        ):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / relative)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
