"""Reads config.json of a checkpoint: every key is kept, and the keys that the project relies on are
checked.

Imports neither torch nor transformers, so the serve environment and every preflight can use it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.config_values import value_faults
from checkpoint.family import NEMOTRON_NANO_VL_V2, Family, find_family, known_architectures
from checkpoint.faults import BadInput, Fault, raise_if_any, shortened
from checkpoint.other_weights import found_instead
from checkpoint.reading import json_kind, parse_json, read_small_file

# Width, depth, heads and MLP width of the ViT that `vision_config.args.model` names. vLLM's
# RadioConfig has the same numbers (vllm/transformers_utils/configs/radio.py, VIT_TIMM_DIM_BY_NAME).
VIT_BY_NAME = {
    "vit_small_patch16_224": (384, 12, 6, 1536),
    "vit_base_patch16_224": (768, 12, 12, 3072),
    "vit_large_patch16_224": (1024, 24, 16, 4096),
    "vit_huge_patch16_224": (1280, 32, 16, 5120),
}

_TOP_KEYS = (
    "downsample_ratio",
    "force_image_size",
    "img_context_token",
    "img_start_token",
    "img_end_token",
    "img_context_token_id",
    "patch_size",
    "projector_hidden_size",
    "ps_version",
    "use_thumbnail",
    "vit_hidden_size",
    "norm_mean",
    "norm_std",
)
_TEXT_KEYS = (
    "hidden_size",
    "hybrid_override_pattern",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "conv_kernel",
    "chunk_size",
    "vocab_size",
    "max_position_embeddings",
)
_COUNTS = (
    "force_image_size",
    "img_context_token_id",
    "patch_size",
    "projector_hidden_size",
    "vit_hidden_size",
)
"""Keys of the top level that must be positive integers; of `_TEXT_KEYS` all but the pattern are."""

_DTYPE_KEYS = ("torch_dtype", "dtype")
"""Where a config says what its weights are; transformers 5 writes the second."""

_ROUNDED_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""Dtypes of weights that are BF16 once they are read: see `checkpoint.files`."""

_LARGEST_COUNT = 2**31 - 1
_MOST_LAYERS = 10_000
"""Layers of the language model or the vision tower at most, so that a wrong number ends here."""

_MOST_ENTRIES = 10_000
"""Entries of a quantization section's lists at most. The 12B has 120 linears, and vLLM compares
each of them with every entry."""

_COPY_CONFIG = "copy config.json from the released checkpoint"


@dataclass(frozen=True)
class VisionTower:
    """The RADIO tower's dimensions, from `vision_config.args.model` and its overrides.

    Attributes:
        hidden_size: Width.
        layers: Number of blocks.
        heads: Attention heads of a block.
        mlp_size: Width inside a block's MLP.
        patch_size: Side of a patch in pixels.
        prefix_tokens: Class and register tokens before the patches.
        class_tokens: The class tokens among them.
        position_side: Side of the square position table in patches: `cpe_max_size / patch_size`.
    """

    hidden_size: int
    layers: int
    heads: int
    mlp_size: int
    patch_size: int
    prefix_tokens: int
    class_tokens: int
    position_side: int


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint's config.json.

    Attributes:
        directory: The checkpoint directory.
        raw: The content of the file; of a model that is not quantized, with bfloat16 where a dtype
            of its weights stands, to which they are rounded.
        family: The names of the model family.
    """

    directory: Path
    raw: Mapping[str, Any]
    family: Family = NEMOTRON_NANO_VL_V2

    @property
    def text(self) -> Mapping[str, Any]:
        """`llm_config`, the language model's own configuration."""
        return self.raw["llm_config"]

    @property
    def pattern(self) -> str:
        """One character per layer: `M` Mamba-2, `-` MLP, `*` attention."""
        return self.text["hybrid_override_pattern"]

    @property
    def depth(self) -> int:
        """Number of layers of the language model."""
        return len(self.pattern)

    @property
    def hidden_size(self) -> int:
        """Width of the language model's residual stream."""
        return self.text["hidden_size"]

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
        width, depth, heads, mlp_size = VIT_BY_NAME[args["model"]]
        patch_size = self.raw["patch_size"]
        class_tokens = 1
        if args.get("cls_token_per_teacher"):
            class_tokens = len({teacher["name"] for teacher in args.get("teachers", [])})
        return VisionTower(
            hidden_size=args.get("hidden_size", width),
            layers=args.get("num_hidden_layers", depth),
            heads=args.get("num_attention_heads", heads),
            mlp_size=args.get("intermediate_size", mlp_size),
            patch_size=patch_size,
            prefix_tokens=class_tokens + _registers(args, class_tokens),
            class_tokens=class_tokens,
            position_side=args["cpe_max_size"] // patch_size,
        )

    def mixer_kind(self, layer: int) -> str:
        """`mamba`, `mlp` or `attention`."""
        return self.family.mixers[self.pattern[layer]]


def _registers(args: Mapping[str, Any], class_tokens: int) -> int:
    """Number of register tokens: a given number, or what fills up to `register_multiple`."""
    if args.get("cpe_num_registers"):
        return args["cpe_num_registers"]
    multiple = args.get("register_multiple") or 0
    if not multiple:
        return 0
    return multiple - class_tokens % multiple


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
        BadInput: The file is missing, cannot be read, is not a JSON object, or would take unbounded
            time or memory: see checkpoint/reading.py.
    """
    if not path.exists():
        raise BadInput(Fault(str(path), "no such file", "is this a checkpoint directory?"))
    value = parse_json(read_small_file(path), path)
    if not isinstance(value, dict):
        what = f"is a JSON {json_kind(value)}, not a JSON object"
        raise BadInput(Fault(str(path), what, "copy the file again"))
    return value


def read_config(directory: str | Path) -> CheckpointConfig:
    """Read and check `directory/config.json`.

    Raises:
        BadInput: With every fault: no such directory, an unknown architecture, a missing key, an
            unknown mixer kind or vision tower.
    """
    directory = Path(directory)
    raise_if_any(absence_faults(directory))
    path = directory / "config.json"
    raw = read_json(path)
    family = find_family(raw.get("architectures"))
    if family is None:
        known = ", ".join(known_architectures())
        found = shortened(raw.get("architectures"))
        what = f"architectures is {found}, expected one of: {known}"
        raise BadInput(Fault(str(path), what, "only these models are supported"))
    raise_if_any(_config_faults(raw, family, str(path)))
    if not is_quantized(raw):
        raw = _in_bf16(raw)
    config = CheckpointConfig(directory, raw, family)
    raise_if_any(value_faults(config))
    return config


def absence_faults(directory: Path) -> Iterator[Fault]:
    """Yield the fault of a path that is no directory, or of a directory without config.json."""
    if not directory.is_dir():
        yield _no_directory(directory)
    elif not (directory / "config.json").exists():
        yield _no_config(directory)


def _no_directory(directory: Path) -> Fault:
    """The fault of a path that is no directory."""
    if directory.is_file():
        what = "is a file, not a directory"
        return Fault(str(directory), what, "give the directory of a checkpoint")
    remedy = "give the directory of a checkpoint"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)) and not directory.parent.exists():
        remedy = (
            f"if it is a name on the Hub: hf download {directory} --local-dir DIR, then give DIR"
        )
    return Fault(str(directory), "no such directory", remedy)


def _no_config(directory: Path) -> Fault:
    """The fault of a directory without config.json, by what it holds instead."""
    instead = found_instead(directory)
    if instead is None:
        remedy = "is this a checkpoint directory?"
        return Fault(str(directory / "config.json"), "no such file", remedy)
    names, remedy = instead
    return Fault(str(directory), f"contains no config.json, but {names}", remedy)


def is_quantized(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a quantized checkpoint."""
    return raw.get("quantization_config") is not None


def _in_bf16(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same weights in BF16, as the released one writes it."""
    changed = dict(raw)
    changed.pop("quantization_config", None)
    for key in ("llm_config", "vision_config"):
        changed[key] = dict(raw[key])
    for section in (changed, changed["llm_config"], changed["vision_config"]):
        for key in _DTYPE_KEYS:
            if section.get(key) is not None:
                section[key] = "bfloat16"
    return changed


def bf16_faults(config: CheckpointConfig) -> Iterator[Fault]:
    """Yield a fault when a config says that the checkpoint is not BF16."""
    if is_quantized(config.raw):
        what = "is quantized already"
        yield Fault(str(config.directory), what, "give the BF16 checkpoint")


def _config_faults(raw: Mapping[str, Any], family: Family, where: str) -> Iterator[Fault]:
    for key in _TOP_KEYS:
        if key not in raw:
            yield Fault(where, f"key {key} is missing", _COPY_CONFIG)
    yield from _count_faults(raw, _COUNTS, "", where)
    yield from _scale_faults(raw, where)
    yield from _dtype_faults(raw, where)
    text = raw.get("llm_config")
    if isinstance(text, dict):
        yield from _text_faults(text, family, where)
    else:
        yield Fault(where, "llm_config is missing", _COPY_CONFIG)
    yield from _vision_faults(raw.get("vision_config"), where)
    yield from _quantization_faults(raw.get("quantization_config"), where)


def _count_faults(
    section: Mapping[str, Any], keys: tuple[str, ...], prefix: str, where: str
) -> Iterator[Fault]:
    """Yield the keys whose value is not a positive integer that a tensor's shape may contain."""
    for key in keys:
        value = section.get(key)
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if key in section and not (is_count and 0 < section[key] <= _LARGEST_COUNT):
            what = f"{prefix}{key} is {shortened(repr(value), 60)}, not a positive integer"
            yield Fault(where, what, _COPY_CONFIG)


def _scale_faults(raw: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """Check what pixels are scaled by."""
    ratio = raw.get("downsample_ratio", 0.5)
    if not _is_number(ratio) or not 0 < ratio <= 1:
        what = f"downsample_ratio is {shortened(repr(ratio), 60)}, not between 0 and 1"
        yield Fault(where, what, _COPY_CONFIG)
    for key in ("norm_mean", "norm_std"):
        values = raw.get(key, [1.0, 1.0, 1.0])
        is_sound = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
        if not is_sound or (key == "norm_std" and 0 in values):
            what = f"{key} is {shortened(repr(values), 60)}, not three numbers"
            yield Fault(where, what, _COPY_CONFIG)
    for key in ("img_context_token", "img_start_token", "img_end_token"):
        if key in raw and not (isinstance(raw[key], str) and raw[key]):
            what = f"{key} is {shortened(repr(raw[key]), 60)}, not a token"
            yield Fault(where, what, _COPY_CONFIG)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text_faults(text: Mapping[str, Any], family: Family, where: str) -> Iterator[Fault]:
    for key in _TEXT_KEYS:
        if key not in text:
            yield Fault(where, f"key llm_config.{key} is missing", _COPY_CONFIG)
    counts = tuple(key for key in _TEXT_KEYS if key != "hybrid_override_pattern")
    yield from _count_faults(text, counts, "llm_config.", where)
    pattern = str(text.get("hybrid_override_pattern", ""))
    if len(pattern) > _MOST_LAYERS:
        what = f"llm_config.hybrid_override_pattern has {len(pattern)} layers"
        yield Fault(where, what, _COPY_CONFIG)
        return
    unknown = sorted(set(pattern) - set(family.mixers))
    if unknown:
        allowed = " ".join(family.mixers)
        found = shortened(unknown, 60)
        what = f"llm_config.hybrid_override_pattern contains {found}, allowed are {allowed}"
        yield Fault(where, what, "mixture-of-experts layers are not supported")
    layers = text.get("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        what = (
            f"num_hidden_layers is {shortened(layers, 60)}, the pattern has {len(pattern)} layers"
        )
        yield Fault(where, what, _COPY_CONFIG)
    # vLLM reads the dtype of the embeddings from this key and asserts that it is one.
    if not (text.get("torch_dtype") or text.get("dtype")):
        yield Fault(where, "llm_config.torch_dtype is not bfloat16", "add it: vLLM requires it")


def declared_dtypes(raw: Mapping[str, Any]) -> dict[str, str]:
    """Return what a config.json says its weights are, by dotted key."""
    found = {}
    for prefix, section in (("", raw), ("llm_config.", raw.get("llm_config"))):
        for key in _DTYPE_KEYS:
            value = section.get(key) if isinstance(section, dict) else None
            if value is not None:
                found[f"{prefix}{key}"] = str(value).removeprefix("torch.")
    return found


def _dtype_faults(raw: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """Yield the dtypes that are not those of weights; of a quantized checkpoint, all but bfloat16.

    What fine-tuning saves in float32 is rounded as it is read, but scales belong to BF16 values.
    """
    allowed = ("bfloat16",) if is_quantized(raw) else _ROUNDED_DTYPES
    for key, dtype in declared_dtypes(raw).items():
        if dtype not in allowed:
            yield Fault(
                where, f"{key} is not bfloat16 but {shortened(dtype, 60)}", "write bfloat16"
            )


def _vision_faults(vision: object, where: str) -> Iterator[Fault]:
    args = vision.get("args") if isinstance(vision, dict) else None
    if not isinstance(args, dict) or "cpe_max_size" not in args:
        yield Fault(where, "vision_config.args.cpe_max_size is missing", _COPY_CONFIG)
        return
    model = args.get("model")
    if not isinstance(model, str) or model not in VIT_BY_NAME:
        what = f"vision_config.args.model is {shortened(repr(model), 60)}"
        yield Fault(where, what, f"known: {', '.join(VIT_BY_NAME)}")
    counts = ["cpe_max_size"]
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if key in args:
            counts.append(key)
    yield from _count_faults(args, tuple(counts), "vision_config.args.", where)
    for key in ("num_hidden_layers", "register_multiple", "cpe_num_registers"):
        value = args.get(key) or 0
        if not isinstance(value, int) or not 0 <= value <= _MOST_LAYERS:
            what = f"vision_config.args.{key} is {shortened(repr(value), 60)}"
            yield Fault(where, what, _COPY_CONFIG)
    teachers = args.get("teachers") or []
    is_list = isinstance(teachers, list)
    if not is_list or not all(isinstance(item, dict) and "name" in item for item in teachers):
        what = "vision_config.args.teachers is not a list of named teachers"
        yield Fault(where, what, _COPY_CONFIG)


def _quantization_faults(section: object, where: str) -> Iterator[Fault]:
    """Yield the lists of a quantization section that would take for ever to compare with."""
    if not isinstance(section, dict):
        return
    for key in ("ignore", "exclude_modules", "quantized_layers"):
        entries = section.get(key)
        if isinstance(entries, list | dict) and len(entries) > _MOST_ENTRIES:
            what = f"quantization_config.{key} has {len(entries):,} entries, at most"
            yield Fault(where, f"{what} {_MOST_ENTRIES:,} are read", "export again")
