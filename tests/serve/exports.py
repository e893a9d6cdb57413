"""Quantized directories made by hand from the embedded checkpoint: the contract in plain torch, without ModelOpt.

They let the serve tests run without a calibration, and hold vLLM to what the directory must look like, not to what our
exporter writes.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoint.config import read_config
from checkpoint.layout import language_model_linears

INPUT_AMAX = 8.0
E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
IGNORE = ["lm_head", "*lm_head*", "*conv1d*", "mlp1*", "vision_model*"]


def fp8_tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().max().float() / 448
    return {
        "weight": (weight.float() / scale).clamp(-448, 448).to(E4M3),
        "weight_scale": scale,
        "input_scale": torch.tensor(INPUT_AMAX / 448),
    }


def nvfp4_tensors(weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """`amax` is the weight's, or the largest of q, k and v, which vLLM fuses and gives one global scale."""
    global_scale = amax.float() / (6 * 448)
    blocks = weight.float().reshape(weight.shape[0], -1, 16)
    scale = (blocks.abs().amax(-1) / 6 / global_scale).clamp(2**-9, 448).to(E4M3)
    scaled = blocks / (scale.float() * global_scale)[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    codes = codes.reshape(weight.shape).to(torch.uint8)
    return {
        "weight": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": scale,
        "weight_scale_2": global_scale,
        "input_scale": torch.tensor(INPUT_AMAX / (6 * 448)),
    }


def write_export(source: Path, out: Path, formats: dict[str, str]) -> Path:
    """Quantize the linears of each kind (`mamba`, `mlp`, `attention`) to `FP8` or `NVFP4`; other kinds stay BF16."""
    shutil.copytree(source, out)
    config = read_config(source)
    tensors = load_file(source / "model.safetensors")
    layers = {}
    for linear in language_model_linears(config):
        if linear.kind not in formats:
            continue
        weight = tensors.pop(f"{linear.name}.weight")
        if formats[linear.kind] == "FP8":
            packed, layers[linear.name] = fp8_tensors(weight), {"quant_algo": "FP8"}
        else:
            fused = [weight]
            if linear.short in ("q_proj", "k_proj", "v_proj"):
                stem = linear.name.rsplit(".", 1)[0]
                whole = load_file(source / "model.safetensors")
                fused = [whole[f"{stem}.{short}.weight"] for short in ("q_proj", "k_proj", "v_proj")]
            packed = nvfp4_tensors(weight, max(part.abs().max() for part in fused))
            layers[linear.name] = {"quant_algo": "NVFP4", "group_size": 16}
        tensors |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    algos = set(formats.values())
    section = {"quant_method": "modelopt", "ignore": IGNORE}
    if len(algos) == 1 and len(formats) == 3:
        section |= {"quant_algo": algos.pop(), "group_size": 16}
    else:
        section |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    raw = dict(config.raw) | {"quantization_config": section}
    (out / "config.json").write_text(json.dumps(raw))
    return out
