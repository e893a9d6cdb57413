"""`quantize.auto`: a recipe's layers scored in each format, and the mix of formats that fits its
size.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from calibrate.forward import embed_all
from calibrate.samples import Skipped
from checkpoint.config import CheckpointConfig
from checkpoint.faults import Fault
from checkpoint.native import load_model
from pipeline.inputs import prompt_stream
from quantize.policy import Policy
from quantize.sensitivity import Search, format_bits, search_formats
from recipes.schema import Recipe


def auto_faults(recipe: Recipe) -> Iterator[Fault]:
    """What is wrong with a recipe's automatic mix, seen before any weight is loaded."""
    auto = recipe.quantize.auto
    if auto is None:
        return
    smallest = min(auto.formats, key=format_bits)
    if auto.bits < format_bits(smallest):
        what = f"{auto.bits:g} bits a weight are less than {smallest}'s {format_bits(smallest):g}"
        yield Fault("quantize.auto.bits", what, "raise it, or add a smaller format")
    if recipe.distill is not None:
        remedy = "run without distill, then write the mix into quantize.layers"
        yield Fault(
            "quantize.auto",
            "a distillation must know its formats when it is taken up again",
            remedy,
        )


def searched(
    recipe: Recipe,
    config: CheckpointConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    device: str,
) -> Search | None:
    """Load BF16, score it on the first calibration samples and choose the mix; None for a recipe
    without `auto`.

    Args:
        recipe: Checked.
        config: The BF16 checkpoint's.
        policy: What it quantizes is searched.
        tokenizer: The checkpoint's.
        device: A torch device.

    Raises:
        BadInput: As `pipeline.inputs.prompt_stream`.
    """
    auto, section = recipe.quantize.auto, recipe.calibrate
    if auto is None:
        return None
    rate, skipped = section.video_pruning_rate, Skipped(section.max_skipped)
    first = section.model_copy(update={"samples": auto.samples})
    prompts = prompt_stream(first, config, tokenizer, skipped, rate, section.max_length)
    model = load_model(config, device)
    given = embed_all(model, prompts, config, rate, auto.samples)
    found = search_formats(model.language_model, policy, given, auto.formats, auto.bits)
    del model
    gc.collect()  # ModelOpt's modules refer to one another, and the next model wants the memory
    return found
