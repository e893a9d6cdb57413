"""Writes the directory of an export of the 12B without its weights, for `--load-format dummy`.

    python -m benchmarks.unweighted OUT --format fp8     # or bf16, nvfp4, nvfp4_weight_only

config.json, hf_quant_config.json and the tokenizer are those of an export by the shipped recipe, so
vLLM builds the same layers. It fills them with random numbers: times are right, answers mean
nothing.
"""

from __future__ import annotations

from pathlib import Path

from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main

BF16 = "bf16"

FORMATS = (BF16, "fp8", "nvfp4", "nvfp4_weight_only")
"""BF16, and the recipes of `recipes/` that name a format of their own."""


def write_unweighted(out: Path, format: str = "fp8") -> None:
    """Write a directory of the 12B without weights.

    Args:
        out: Directory to write; appears whole at the end.
        format: One of `FORMATS`.

    Raises:
        BadInput: It exists.
    """
    import torch

    from checkpoint.atomic import check_output, replaced_directory, write_json, write_tensors
    from checkpoint.config import CheckpointConfig
    from checkpoint.layout import language_model_linears
    from checkpoint.synthetic import synthetic_config
    from checkpoint.tokenizer import write_tokenizer
    from export.write import convert_hf_quant_config_format, quantization_config
    from quantize.policy import make_policy
    from recipes.loading import SHIPPED, load_recipe

    check_output(out, 0)
    config = CheckpointConfig(out, synthetic_config("full"))
    legacy = None
    if format != BF16:
        quantize = load_recipe(SHIPPED / f"{format}.yaml", [f"output={out}"]).quantize
        linears = language_model_linears(config)
        policy = make_policy(quantize.layers, linears, quantize.kv_cache, config.family)
        legacy = quantization_config(policy)
    with replaced_directory(out) as partial:
        raw = dict(config.raw)
        if legacy is not None:
            raw["quantization_config"] = convert_hf_quant_config_format(legacy)
            write_json(partial / "hf_quant_config.json", legacy)
        write_json(partial / "config.json", raw)
        write_tokenizer(partial, config)
        # Passes the check that there are weights.
        write_tensors(partial / "model.safetensors", {"none": torch.zeros(1)})


def _run() -> int:
    parser = command_parser("benchmarks.unweighted", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; must not exist")
    parser.add_argument("--format", choices=FORMATS, default="fp8", help="(default: fp8)")
    options = parse_command(parser)
    write_unweighted(options.out, options.format)
    return 0


if __name__ == "__main__":
    main(_run)
