"""Writes a random-weight checkpoint of the released architecture at full or medium size, shard by
shard.

    python -m checkpoint.synthetic OUT --size full      # 760 tensors, 26.36 GB: the 12B's config
    python -m checkpoint.synthetic OUT --size medium    # the same kinds of layers at about 1.4 GB

For measuring time, memory and disk without the released weights. Activations stay finite through
all layers; answers mean nothing. Weights are drawn on the GPU where there is one; the same seed
gives the same bytes on the same device.
"""

from __future__ import annotations

import copy
import zlib
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint.atomic import check_output, replaced_directory, write_json, write_tensors
from checkpoint.command import command_parser, parse_command
from checkpoint.config import CheckpointConfig, read_json
from checkpoint.faults import main
from checkpoint.layout import TensorSpec, expected_tensors, spec_bytes, split_by_size
from checkpoint.other_weights import INDEX
from checkpoint.tokenizer import RELEASED, write_tokenizer

SIZES = ("full", "medium")
SHARD_BYTES = 4_900_000_000

_MEDIUM_TEXT = {
    "hidden_size": 1536,
    "hybrid_override_pattern": "M-M-M*-M-M-M*-",
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "mamba_num_heads": 64,
    "mamba_head_dim": 48,
}


def synthetic_config(size: str) -> dict[str, Any]:
    """The configuration of a size: `full` is the released one."""
    config = copy.deepcopy(read_json(RELEASED / "config.json"))
    if size == "medium":
        config["llm_config"].update(_MEDIUM_TEXT)
        config["projector_hidden_size"] = 6144
        config["vision_config"]["args"]["num_hidden_layers"] = 4
    return config


def write_synthetic(
    out: Path, size: str, seed: int = 0, device: str | None = None
) -> CheckpointConfig:
    """Write a random-weight checkpoint and return its configuration.

    Args:
        out: Directory to write; appears whole at the end.
        size: `full` or `medium`.
        seed: Of the weights.
        device: Where they are drawn; by default the GPU if there is one.

    Raises:
        BadInput: `out` exists or the disk is too small.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config = CheckpointConfig(out, synthetic_config(size))
    specs = expected_tensors(config)
    shards = split_by_size(specs, SHARD_BYTES)
    total = spec_bytes(specs)
    check_output(out, total)
    weight_map: dict[str, str] = {}
    with (
        replaced_directory(out) as partial,
        tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=None) as progress,
    ):
        write_json(partial / "config.json", config.raw)
        write_tokenizer(partial, config)
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _draw(name, specs[name], seed, device) for name in names}
            write_tensors(partial / file, tensors)
            for name in names:
                weight_map[name] = file
                progress.update(specs[name].nbytes)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(partial / INDEX, index)
    return config


def _draw(name: str, spec: TensorSpec, seed: int, device: str) -> torch.Tensor:
    """Draw one tensor; its generator depends on the name, not on the order of writing."""
    if spec.dtype == "I64":
        return torch.arange(spec.shape[0])
    # torch's generator for CPUs uses the lower 32 bits of a seed only.
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode(), seed))
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    is_vector = len(spec.shape) == 1
    if last == "A_log":
        uniform = torch.empty(spec.shape, device=device).uniform_(1, 16, generator=generator)
        return uniform.log().to(torch.bfloat16).cpu()
    if last == "dt_bias":
        uniform = torch.empty(spec.shape, device=device).uniform_(-6.9, -2.3, generator=generator)
        step = uniform.exp()
        inverse_softplus = step + torch.log(-torch.expm1(-step))
        return inverse_softplus.to(torch.bfloat16).cpu()
    values = torch.randn(spec.shape, device=device, generator=generator, dtype=torch.bfloat16)
    if last == "D" or (is_vector and not last.endswith("bias")):
        values = 1 + 0.1 * values
    elif last in ("token", "pos_embed", "embeddings"):
        values = 0.5 * values
    else:
        fan_in = 2500 if is_vector else torch.Size(spec.shape[1:]).numel()
        values = values / fan_in**0.5
    return values.to(torch.bfloat16).cpu()


def _run() -> int:
    parser = command_parser("checkpoint.synthetic", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; must not exist")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse_command(parser)
    config = write_synthetic(arguments.out, arguments.size, arguments.seed)
    count = len(expected_tensors(config))
    print(f"{config.directory}: {config.depth} layers, {count} tensors")
    return 0


if __name__ == "__main__":
    main(_run)
