"""Writes the quantized checkpoint from the source's files: quantized tensors replaced, everything else bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import modelopt
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from tqdm import tqdm

from checkpoint.config import CheckpointConfig
from checkpoint.files import INDEX, SINGLE, TensorFiles
from checkpoint.layout import TensorSpec, expected_tensors, language_model_linears, plan_shards, spec_bytes
from checkpoint.writing import check_output, finished_directory, save_tensors
from export.manifest import MANIFEST, Manifest, write_manifest
from export.matching import exclude_list
from quantize.formats import FORMATS, NVFP4_BLOCK, UNQUANTIZED
from quantize.policy import Policy
from quantize.ptq import PackedLinear

SHARD_BYTES = 5_000_000_000
_OURS = ("config.json", "hf_quant_config.json", MANIFEST, INDEX)


def output_specs(config: CheckpointConfig, policy: Policy, source: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Name, shape and dtype of every tensor of the quantized checkpoint, before anything is computed.

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
    shards = plan_shards(specs, shard_bytes)
    with finished_directory(output) as partial:
        _copy_other_files(config.directory, partial)
        tensors = _output_tensors(specs, source, packed)
        weight_map: dict[str, str] = {}
        with tqdm(total=spec_bytes(specs), desc="writing", unit="B", unit_scale=True, disable=None) as progress:
            for number, names in enumerate(shards, start=1):
                file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                shard = dict(next(tensors) for _ in names)
                save_tensors(shard, partial / file)
                weight_map.update(dict.fromkeys(names, file))
                progress.update(spec_bytes({name: specs[name] for name in names}))
        if len(shards) > 1:
            _write_json(partial / INDEX, {"metadata": {"total_size": spec_bytes(specs)}, "weight_map": weight_map})
        legacy = quantization_config(policy)
        _write_json(partial / "hf_quant_config.json", legacy)
        _write_json(
            partial / "config.json",
            dict(config.raw) | {"quantization_config": convert_hf_quant_config_format(legacy)},
        )
        write_manifest(partial, manifest)


def quantization_config(policy: Policy) -> dict[str, Any]:
    """The content of hf_quant_config.json: algorithm, KV cache, group size and exclude list."""
    section: dict[str, Any] = {
        "quant_algo": policy.algo,
        "kv_cache_quant_algo": "FP8" if policy.kv_cache == "fp8" else None,
        "exclude_modules": exclude_list([n for n, format in policy.formats.items() if format == UNQUANTIZED]),
    }
    if policy.algo == "NVFP4":
        section["group_size"] = NVFP4_BLOCK
    if policy.algo == "MIXED_PRECISION":
        section["quantized_layers"] = {
            name: {"quant_algo": FORMATS[format].algo} | ({"group_size": NVFP4_BLOCK} if format == "nvfp4" else {})
            for name, format in policy.quantized.items()
        }
    return {"producer": {"name": "modelopt", "version": modelopt.__version__}, "quantization": section}


def _output_tensors(
    specs: Mapping[str, TensorSpec], source: TensorFiles, packed: Iterator[PackedLinear]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every output tensor in the order of `specs`, each checked against its shape and dtype."""
    pending: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        if source.specs.get(name) == spec:
            tensor = source.read(name)
        else:  # a packed weight, or a scale, which the source has not
            if name not in pending:
                ready = next(packed)
                pending.update({f"{ready.name}.{suffix}": tensor for suffix, tensor in ready.tensors.items()})
            tensor = pending.pop(name)
        if tuple(tensor.shape) != spec.shape:
            raise AssertionError(f"{name} has shape {tuple(tensor.shape)}, planned {spec.shape}")
        yield name, tensor


def _copy_other_files(source: Path, target: Path) -> None:
    """Tokenizer, Python files, templates, processor settings, licence: whatever the source has, in its folders too."""
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if not file.is_file() or hidden or relative.suffix == ".safetensors" or str(relative) in _OURS:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / relative)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
