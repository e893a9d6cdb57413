"""Reads config.json of a NemotronH_Nano_VL_V2 checkpoint: every key kept, the ones we rely on
checked and named.

Imports neither torch nor transformers, so the serve environment and every preflight can use it for
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.faults import BadInput, Fault, raise_if_any

ARCHITECTURE = "NemotronH_Nano_VL_V2"

# Width, depth, heads and MLP width of the ViT that `vision_config.args.model` names. The same four
# numbers stand in vLLM's RadioConfig (vllm/transformers_utils/configs/radio.py,
# VIT_TIMM_DIM_BY_NAME).
VIT_BY_NAME = {
    "vit_small_patch16_224": (384, 12, 6, 1536),
    "vit_base_patch16_224": (768, 12, 12, 3072),
    "vit_large_patch16_224": (1024, 24, 16, 4096),
    "vit_huge_patch16_224": (1280, 32, 16, 5120),
}

MIXER_KINDS = {"M": "mamba", "-": "mlp", "*": "attention"}

_TOP_KEYS = (
    "downsample_ratio force_image_size img_context_token img_start_token img_end_token img_context_token_id "
    "patch_size projector_hidden_size ps_version use_thumbnail vit_hidden_size norm_mean norm_std"
).split()
_TEXT_KEYS = (
    "hidden_size hybrid_override_pattern num_attention_heads num_key_value_heads head_dim intermediate_size "
    "mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel chunk_size vocab_size "
    "max_position_embeddings"
).split()


@dataclass(frozen=True)
class VisionTower:
    """The RADIO tower's dimensions, from `vision_config.args.model` and its overrides."""

    hidden_size: int
    layers: int
    heads: int
    mlp_size: int
    patch_size: int
    prefix_tokens: int
    """Class and register tokens before the patches, together a multiple of `register_multiple`."""
    class_tokens: int
    position_side: int
    """Side of the square position table, in patches (`cpe_max_size / patch_size`)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint's config.json. `raw` is the file as it stands; the properties are what the rooms
    ask of it.
    """

    directory: Path
    raw: Mapping[str, Any]

    @property
    def text(self) -> Mapping[str, Any]:
        """`llm_config`, the language model's own configuration."""
        return self.raw["llm_config"]

    @property
    def pattern(self) -> str:
        """One character a layer: `M` Mamba-2, `-` MLP, `*` attention."""
        return self.text["hybrid_override_pattern"]

    @property
    def tile_size(self) -> int:
        """Side of a tile or video frame in pixels."""
        return self.raw["force_image_size"]

    @property
    def tokens_per_tile(self) -> int:
        """Placeholder tokens of one tile after pixel shuffle: 256 for 512-pixel tiles."""
        side = int(self.tile_size // self.raw["patch_size"] * self.raw["downsample_ratio"])
        return side * side

    @property
    def image_token_id(self) -> int:
        """Id of `<image>`, the placeholder of one visual token."""
        return self.raw["img_context_token_id"]

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens."""
        return self.raw.get("max_sequence_length") or self.text["max_position_embeddings"]

    @property
    def vision(self) -> VisionTower:
        """The vision tower's dimensions."""
        args = self.raw["vision_config"]["args"]
        named = VIT_BY_NAME[args["model"]]
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        width, depth, heads, mlp = (
            args.get(key, value) for key, value in zip(keys, named, strict=True)
        )
        patch = self.raw["patch_size"]
        teachers = {teacher["name"] for teacher in args.get("teachers", [])}
        class_tokens = len(teachers) if args.get("cls_token_per_teacher") else 1
        multiple = args.get("register_multiple") or 0
        registers = args.get("cpe_num_registers") or (
            multiple - class_tokens % multiple if multiple else 0
        )
        return VisionTower(
            width,
            depth,
            heads,
            mlp,
            patch,
            class_tokens + registers,
            class_tokens,
            args["cpe_max_size"] // patch,
        )

    def mixer_kind(self, layer: int) -> str:
        """`mamba`, `mlp` or `attention`."""
        return MIXER_KINDS[self.pattern[layer]]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`; raises `BadInput` naming the file when it is missing or is
    not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            Fault(str(path), "no such file", "is this a checkpoint directory?")
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(
            Fault(str(path), f"cannot be read as JSON: {error}", "copy the file again")
        ) from None
    if not isinstance(value, dict):
        raise BadInput(
            Fault(
                str(path),
                f"holds a {type(value).__name__}, not a JSON object",
                "copy the file again",
            )
        )
    return value


def read_config(directory: str | Path) -> CheckpointConfig:
    """Read and check `directory/config.json`.

    Raises:
        BadInput: With every fault: no such directory, another architecture, a missing key, an
            unknown mixer kind or vision tower.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(
            Fault(str(directory), "no such directory", "give the directory of the checkpoint")
        )
    raw = read_json(directory / "config.json")
    where = str(directory / "config.json")
    found = raw.get("architectures")
    if found != [ARCHITECTURE]:
        raise BadInput(
            Fault(
                where,
                f"architectures is {found}, expected ['{ARCHITECTURE}']",
                "only this model works",
            )
        )
    raise_if_any(_faults(raw, where))
    return CheckpointConfig(directory, raw)


def _faults(raw: Mapping[str, Any], where: str) -> list[Fault]:
    remedy = "copy config.json from the released checkpoint"
    faults = [Fault(where, f"key {key} is missing", remedy) for key in _TOP_KEYS if key not in raw]
    text, vision = raw.get("llm_config"), raw.get("vision_config")
    if not isinstance(text, dict):
        faults.append(Fault(where, "llm_config is missing", remedy))
    else:
        faults += [
            Fault(where, f"key llm_config.{key} is missing", remedy)
            for key in _TEXT_KEYS
            if key not in text
        ]
        pattern = str(text.get("hybrid_override_pattern", ""))
        if strange := sorted(set(pattern) - set(MIXER_KINDS)):
            faults.append(
                Fault(
                    where,
                    f"llm_config.hybrid_override_pattern has {strange}, allowed are M - *",
                    "no MoE here",
                )
            )
        if text.get("num_hidden_layers", len(pattern)) != len(pattern):
            faults.append(
                Fault(
                    where,
                    f"num_hidden_layers {text['num_hidden_layers']} but {len(pattern)} in pattern",
                )
            )
        # vLLM reads the dtype of the embeddings it is to build from here and asserts that it is
        # one.
        if (text.get("torch_dtype") or text.get("dtype")) != "bfloat16":
            faults.append(
                Fault(where, "llm_config.torch_dtype is not bfloat16", "vLLM needs it: add it")
            )
    args = vision.get("args") if isinstance(vision, dict) else None
    if not isinstance(args, dict) or "cpe_max_size" not in args:
        faults.append(Fault(where, "vision_config.args.cpe_max_size is missing", remedy))
    elif args.get("model") not in VIT_BY_NAME:
        faults.append(
            Fault(
                where,
                f"vision_config.args.model is {args.get('model')!r}",
                f"known: {', '.join(VIT_BY_NAME)}",
            )
        )
    return faults
