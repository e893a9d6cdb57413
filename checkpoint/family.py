"""What distinguishes one model family from another: names of tensors and modules, in one value.

Only `NemotronH_Nano_VL_V2` is known. A second family is a second `Family`, registered with
`register_family`; tests/checkpoint/test_family.py runs the flow on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of one model family.

    Attributes:
        architecture: The entry of `architectures` in config.json.
        language_model: Prefix of the language model's tensors.
        backbone: Prefix of its embeddings, layers and final norm.
        vision: Prefix of the vision tower's tensors.
        projector: Prefix of the projector's tensors.
        mixers: Kind of mixer by its character in `hybrid_override_pattern`.
        fused: Linears that vLLM loads into one fused module, by the fused module's last name.
        kv_linears: Linears that produce keys and values, with the suffix of their KV cache scale.
        never_quantized: Patterns of vLLM module names that an exclude list must contain.
        optional_tensors: Tensors that a checkpoint may lack.
        native_backbone: What `backbone` is called in transformers' `NemotronHForCausalLM`.
        released_names: Prefixes that differ from the release's, with the release's own:
            transformers' loader expects the names of the release.
        vllm_renames: Replacements that turn a checkpoint name into vLLM's module name, in order.
    """

    architecture: str
    language_model: str
    backbone: str
    vision: str
    projector: str
    mixers: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    kv_linears: Mapping[str, str]
    never_quantized: tuple[str, ...]
    optional_tensors: tuple[str, ...]
    native_backbone: str
    released_names: Mapping[str, str]
    vllm_renames: tuple[tuple[str, str], ...]

    @property
    def layers(self) -> str:
        """Prefix of the layers, followed by the layer's index."""
        return f"{self.backbone}layers."

    @property
    def embeddings(self) -> str:
        """Name of the token embeddings, without `.weight`."""
        return f"{self.backbone}embeddings"

    @property
    def final_norm(self) -> str:
        """Name of the norm after the last layer, without `.weight`."""
        return f"{self.backbone}norm_f"

    @property
    def lm_head(self) -> str:
        """Name of the output layer, without `.weight`."""
        return f"{self.language_model}lm_head"

    def layer_prefix(self, layer: int) -> str:
        """Prefix of the tensors of one layer."""
        return f"{self.layers}{layer}."

    def layer_of(self, name: str) -> int | None:
        """Index of the layer that a tensor or linear belongs to; None for those outside layers."""
        if not name.startswith(self.layers):
            return None
        return int(name.removeprefix(self.layers).partition(".")[0])

    def native_module(self, name: str) -> str:
        """Path inside transformers' `NemotronHForCausalLM` of a tensor or linear of this family.

        `language_model.backbone.layers.0.mixer.in_proj` is `model.layers.0.mixer.in_proj` there.
        """
        if name.startswith(self.backbone):
            return self.native_backbone + name.removeprefix(self.backbone)
        return name.removeprefix(self.language_model)

    def checkpoint_name(self, native: str) -> str:
        """The inverse of `native_module`."""
        if native.startswith(self.native_backbone):
            return self.backbone + native.removeprefix(self.native_backbone)
        return self.language_model + native

    def released_name(self, name: str) -> str:
        """The name under which transformers' loader expects a tensor: that of the release."""
        for ours, released in self.released_names.items():
            if name.startswith(ours):
                return released + name.removeprefix(ours)
        return name

    def vllm_module(self, name: str) -> str:
        """vLLM's name for a module of the checkpoint, not fused."""
        for old, new in self.vllm_renames:
            name = name.replace(old, new, 1)
        return name

    def fused_module(self, name: str) -> str:
        """vLLM's name for the module that a linear of the checkpoint is loaded into."""
        parent, _, last = self.vllm_module(name).rpartition(".")
        for fused, parts in self.fused.items():
            if last in parts:
                return f"{parent}.{fused}"
        return f"{parent}.{last}"

    def fused_parts(self, short: str) -> tuple[str, ...]:
        """All linears that are fused with the linear `short`, itself included; () if none are."""
        for parts in self.fused.values():
            if short in parts:
                return parts
        return ()


NEMOTRON_NANO_VL_V2 = Family(
    architecture="NemotronH_Nano_VL_V2",
    language_model="language_model.",
    backbone="language_model.backbone.",
    vision="vision_model.radio_model.",
    projector="mlp1.",
    mixers={"M": "mamba", "-": "mlp", "*": "attention"},
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj")},
    kv_linears={"k_proj": "k_scale", "v_proj": "v_scale"},
    # lm_head has been given the quantization config from vLLM 0.32 on, so it must match. Full names
    # miss versions that do not rename entries, hence the pattern beside the name.
    never_quantized=(
        "language_model.lm_head",
        "*lm_head*",
        "language_model.backbone.embeddings",
        "*.mixer.conv1d",
        "mlp1*",
        "vision_model*",
    ),
    # vLLM's loader skips the input conditioner; whether the release holds it is not known here.
    optional_tensors=(
        "vision_model.radio_model.input_conditioner.norm_mean",
        "vision_model.radio_model.input_conditioner.norm_std",
    ),
    native_backbone="model.",
    released_names={},
    vllm_renames=(
        ("language_model.backbone", "language_model.model"),
        (".embeddings", ".embed_tokens"),
    ),
)

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known, under its architecture; a second call with it replaces the first."""
    _FAMILIES[family.architecture] = family


def unregister_family(family: Family) -> None:
    """Undo `register_family`."""
    _FAMILIES.pop(family.architecture, None)


def find_family(architectures: object) -> Family | None:
    """Return the family of config.json's `architectures`; None when it is not known."""
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None
    return _FAMILIES.get(str(architectures[0]))


def known_architectures() -> Iterable[str]:
    """Architectures of all registered families."""
    return tuple(_FAMILIES)


register_family(NEMOTRON_NANO_VL_V2)
