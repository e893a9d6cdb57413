"""vLLM's rule for which modules an exclude list leaves unquantized, and the list that we write.

The rule is reproduced from `ModelOptQuantConfigBase`
(vllm/model_executor/layers/quantization/modelopt.py), which is the same in 0.26 to 0.33: entries
are renamed like weights, then matched exactly (a fused layer by its parts), as substrings, and as
shell patterns.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from checkpoint.family import Family


def exclude_list(unquantized_linears: Sequence[str], family: Family) -> list[str]:
    """Return the `ignore` / `exclude_modules` entries that leave these linears in BF16."""
    return [*family.never_quantized, *unquantized_linears]


def is_excluded(module: str, entries: Sequence[str], family: Family) -> bool:
    """Return whether vLLM leaves `module` unquantized.

    Args:
        module: vLLM's name of it, such as `language_model.model.layers.3.mixer.qkv_proj`.
        entries: The list as the files contain it.
        family: The names of the model family.
    """
    renamed = []
    for entry in entries:
        for variant in _variants(entry):
            renamed.append(_rename(variant, family))
    if module in renamed:
        return True
    parent, _, last = module.rpartition(".")
    parts = family.fused.get(last)
    if parts and all(f"{parent}.{part}" in renamed for part in parts):
        return True
    inner = module.removeprefix(family.language_model)
    for entry in renamed:
        if entry != module and (entry in module or entry in inner):
            return True
        if fnmatch.fnmatch(module, entry):
            return True
    return False


def _variants(entry: str) -> list[str]:
    """vLLM reads `name*` as `name` and `name.*`."""
    if len(entry) >= 2 and entry.endswith("*") and entry[-2] != ".":
        return [entry[:-1], f"{entry[:-1]}.*"]
    return [entry]


def _rename(entry: str, family: Family) -> str:
    """vLLM renames prefixes only, so a pattern with a leading `*` stays as it is."""
    for old, new in family.vllm_renames:
        if entry.startswith(old):
            return new + entry.removeprefix(old)
    return entry
