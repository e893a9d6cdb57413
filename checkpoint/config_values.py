"""Values of config.json that fit every tensor, and that neither transformers nor vLLM can compute.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from checkpoint.faults import Fault, shortened

if TYPE_CHECKING:
    from checkpoint.config import CheckpointConfig

_COPY = "copy config.json from the released checkpoint"

_COMPUTED = {"ps_version": "v2"}
"""What the model's classes compute, whatever config.json says."""

_TEXT_COMPUTED = {
    "attention_bias": False,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
}
"""The same of `llm_config`. A bias would be a tensor that no checkpoint of the family has."""


def value_faults(config: CheckpointConfig) -> Iterator[Fault]:
    """Yield the values that would end a run in the middle, or be computed as if they were others.

    Args:
        config: A configuration whose keys and types have been checked.
    """
    where = str(config.directory / "config.json")
    yield from _other_values(config.raw, _COMPUTED, "", where)
    yield from _other_values(config.text, _TEXT_COMPUTED, "llm_config.", where)
    tower = config.vision
    if not tower.class_tokens:
        what = "vision_config.args.teachers is empty, and each teacher has a class token"
        yield Fault(where, what, _COPY)
    if tower.hidden_size % tower.heads:
        what = f"vision_config.args has {tower.heads} attention heads"
        yield Fault(where, f"{what} for a width of {tower.hidden_size}", _COPY)
    unit = config.raw["patch_size"] / config.raw["downsample_ratio"]
    side = config.tile_size
    if side % unit or side > tower.position_side * tower.patch_size:
        largest = tower.position_side * tower.patch_size
        what = f"force_image_size is {side}, which the vision tower cannot take:"
        yield Fault(where, f"{what} multiples of {unit:g} up to {largest}", _COPY)
    heads = config.text["mamba_num_heads"]
    if heads % config.text["n_groups"]:
        what = f"llm_config.n_groups is {config.text['n_groups']}, for {heads} heads"
        yield Fault(where, what, _COPY)
    queries = config.text["num_attention_heads"]
    if queries % config.text["num_key_value_heads"]:
        keys = config.text["num_key_value_heads"]
        what = f"llm_config.num_key_value_heads is {keys}, for {queries} heads"
        yield Fault(where, what, _COPY)


def _other_values(
    section: Mapping[str, Any], computed: Mapping[str, object], prefix: str, where: str
) -> Iterator[Fault]:
    for key, expected in computed.items():
        found = section.get(key)
        if found is not None and found != expected:
            what = f"{prefix}{key} is {shortened(repr(found), 60)}, the model is computed with"
            yield Fault(where, f"{what} {expected!r}", _COPY)
