"""vLLM's rule for which modules an exclude list leaves unquantized, and the list that we write.

The rule is replayed from `ModelOptQuantConfigBase`
(vllm/model_executor/layers/quantization/modelopt.py), the same in 0.26 to 0.33: entries are renamed
like weights, then matched exactly (fused layers by their parts), as substrings, and as shell
patterns.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

# The model parts that are never quantized. `lm_head` has been given the quantization config from
# vLLM 0.32 on, so it must match; full names miss versions that do not rename entries, hence the
# pattern beside the name.
_ALWAYS = (
    "language_model.lm_head",
    "*lm_head*",
    "language_model.backbone.embeddings",
    "*.mixer.conv1d",
    "mlp1*",
    "vision_model*",
)


def vllm_name(name: str) -> str:
    """vLLM's module name for a checkpoint name: `language_model.backbone.…` is
    `language_model.model.…` there.
    """
    renamed = name.replace("language_model.backbone", "language_model.model", 1)
    return renamed.replace(".embeddings", ".embed_tokens")


def exclude_list(unquantized_linears: Sequence[str]) -> list[str]:
    """The `ignore` / `exclude_modules` entries for a checkpoint with these linears left in BF16."""
    return [*_ALWAYS, *unquantized_linears]


def is_excluded(module: str, entries: Sequence[str]) -> bool:
    """Whether vLLM leaves `module` unquantized.

    Args:
        module: vLLM's name of it, such as `language_model.model.layers.3.mixer.qkv_proj`.
        entries: The list as it stands in the files.
    """
    renamed: list[str] = []
    for entry in entries:
        if len(entry) >= 2 and entry.endswith("*") and entry[-2] != ".":
            renamed += [entry[:-1], entry[:-1] + ".*"]
        else:
            renamed.append(entry)
    # Renaming is by prefix, so a pattern with a leading `*` keeps its words.
    renamed = [
        entry.replace("language_model.backbone", "language_model.model", 1)
        if entry.startswith("language_model.backbone")
        else entry
        for entry in renamed
    ]
    parent, _, last = module.rpartition(".")
    if module in renamed or (
        last in FUSED and all(f"{parent}.{part}" in renamed for part in FUSED[last])
    ):
        return True
    inner = module.removeprefix("language_model.")
    if any(entry != module and (entry in module or entry in inner) for entry in renamed):
        return True
    return any(fnmatch.fnmatch(module, entry) for entry in renamed)
