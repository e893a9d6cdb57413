"""Named damages of an exported directory, and what the verifier must name for each.

`FP8` are done to an export of the tiny FP8 recipe, `MIXED` to one with NVFP4, FP8 and KV scales,
`TRAINED` to an NVFP4 export whose manifest says that all linears were distilled.
"""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.editing import edit_json, edit_tensors, truncate

ALL = ("source", "manifest", "alone")
"""With the source and no digests, with digests and no source, with neither."""
VOUCHED = ("source", "manifest")
LAYER = "language_model.backbone.layers.{}.mixer.{}"
IN_PROJ = LAYER.format(0, "in_proj")
INDEX = "model.safetensors.index.json"
CLASS = "configuration.NemotronH_Nano_VL_V2_Config"


@dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        name: For the test.
        do: Damages a directory.
        file: End of the file's name that a fault must contain.
        key: Text that the same fault must contain.
        seen: What must see it.
    """

    name: str
    do: Callable[[Path], None]
    file: str
    key: str = ""
    seen: tuple[str, ...] = ALL


def key(file: str, dotted: str, value: Any, seen=ALL) -> Damage:
    """One key of a JSON file has another value; None removes it."""
    *parents, last = dotted.split(".")

    def change(content):
        for parent in parents:
            content = content[parent]
        if value is None:
            del content[last]
        else:
            content[last] = value

    name = f"{file} {dotted} {value!r}"[:70]
    return Damage(name, lambda d: edit_json(d / file, change), file, last, seen)


def added(file: str, content: bytes, key: str = "", seen=ALL) -> Damage:
    """A file is there that does not belong there, or has another content."""

    def write(directory):
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_bytes(content)

    return Damage(f"added {file} {content[:12]!r}", write, file, key, seen)


def text(file: str, old: str, new: str, key: str = "", seen=VOUCHED) -> Damage:
    """A text is replaced in a file."""

    def replace(directory):
        content = (directory / file).read_text()
        assert old in content
        (directory / file).write_text(content.replace(old, new))

    return Damage(f"{file} {old[:20]!r} to {new[:20]!r}", replace, file, key, seen)


def tensor(name: str, change: Callable[[dict], None], key: str, seen=VOUCHED) -> Damage:
    """Tensors have other values."""
    return Damage(name, lambda d: edit_tensors(d, change), ".safetensors", key, seen)


def swap(first: str, second: str) -> Callable[[dict], None]:
    def change(tensors):
        for name in list(tensors):
            if name.startswith(f"{first}."):
                other = second + name.removeprefix(first)
                tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[0]


def pickled(directory: Path) -> None:
    first_shard(directory).write_bytes(pickle.dumps({"a": 1}))


def link_out(directory: Path) -> None:
    shard = first_shard(directory)
    outside = directory.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)


def point_out(prefix: str) -> Callable[[Path], None]:
    def change(directory):
        def rename(content):
            tensors = content["weight_map"]
            for name, file in tensors.items():
                tensors[name] = prefix + file

        edit_json(directory / INDEX, rename)

    return change


def duplicate(directory: Path) -> None:
    """A tensor is in two files that the index names."""
    shards = sorted(directory.glob("model-*.safetensors"))
    tensors = load_file(shards[-1])
    tensors["mlp1.0.weight"] = torch.ones_like(load_file(shards[0])["mlp1.0.weight"])
    save_file(tensors, shards[-1], metadata={"format": "pt"})


def huge_header(directory: Path) -> None:
    with first_shard(directory).open("r+b") as file:
        file.write((2**60).to_bytes(8, "little"))


def forged_manifest(directory: Path) -> None:
    edit_json(directory / "hybridquant.json", lambda m: m.update(files={"../x": "0" * 64}))


def another_code(directory: Path) -> None:
    with (directory / "configuration.py").open("a") as file:
        file.write("\nimport os\nos.environ['A'] = 'B'\n")


def pipe(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    os.mkfifo(directory / "tokenizer.json")


SAFE = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"
DEEP = b'{"a": ' + b"[" * 100_000
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"

CONFIGS = [
    key(CONFIG, "norm_mean", [0.0, 0.0, 0.0]),
    key(CONFIG, "norm_std", [1.0, 1.0, 1.0]),
    key(CONFIG, "norm_mean", [0.5, 0.5, 0.5], VOUCHED),
    key(CONFIG, "torch_dtype", None),
    key(CONFIG, "torch_dtype", "float16"),
    key(CONFIG, "patch_size", 8),
    key(CONFIG, "force_image_size", 512),
    key(CONFIG, "downsample_ratio", 0.25),
    key(CONFIG, "img_context_token_id", 981, VOUCHED),
    key(CONFIG, "img_context_token", "<img>"),
    key(CONFIG, "img_start_token", "<image>"),
    key(CONFIG, "ps_version", "v1"),
    key(CONFIG, "use_thumbnail", 1),
    key(CONFIG, "video_context_token_id", 5, VOUCHED),
    key(CONFIG, "video_pruning_rate", 0.9, VOUCHED),
    key(CONFIG, "max_sequence_length", 64, VOUCHED),
    key(CONFIG, "rope_theta", 1, VOUCHED),
    key(CONFIG, "llm_config.rms_norm_eps", 0.1),
    key(CONFIG, "llm_config.layer_norm_epsilon", 1e-2),
    key(CONFIG, "llm_config.mlp_hidden_act", "silu"),
    key(CONFIG, "llm_config.eos_token_id", 2),
    key(CONFIG, "llm_config.time_step_min", 0.5, VOUCHED),
    key(CONFIG, "llm_config.n_groups", 4, ("source", "manifest")),
    key(CONFIG, "llm_config.tie_word_embeddings", True),
    key(CONFIG, "llm_config.chunk_size", 64, VOUCHED),
    key(CONFIG, "vision_config.patch_size", 14),
    key(CONFIG, "vision_config.args.register_multiple", 12, VOUCHED),
    key(CONFIG, "auto_map.AutoConfig", "somebody/else--configuration.Config"),
    key(CONFIG, "auto_map.AutoModel", "os.path.Other"),
    key(CONFIG, "auto_map.AutoConfig", "nowhere.Config"),
    key(CONFIG, "auto_map.AutoProcessor", CLASS, VOUCHED),
    added(CONFIG, DEEP, "nested"),
    added(CONFIG, b"[1]", "JSON list"),
]
SECTION = [
    key(CONFIG, "quantization_config.ignore", "lm_head"),
    key(CONFIG, "quantization_config.quant_method", "fp8"),
    key(CONFIG, "quantization_config.kv_cache_scheme", {"num_bits": 8, "type": "float"}),
    key(CONFIG, "quantization_config.kv_cache_scheme", "FP8"),
    key(CONFIG, "quantization_config.quantization", {"quant_algo": "FP8"}),
    key(CONFIG, "quantization_config.group_size", 32),
    key(CONFIG, "quantization_config.config_groups.group_0.weights.num_bits", 4),
    key("hf_quant_config.json", "quantization.kv_cache_quant_algo", "FP8"),
    key("hf_quant_config.json", "quantization", None),
]
# The faults of `config_groups` name the group, those of `quantization` the key above.
SECTION[6] = Damage(SECTION[6].name, SECTION[6].do, CONFIG, "config_groups")
CHAT = [
    text(TOKENIZER, '"<SPECIAL_12>"', '"<SPECIAL_99>"'),
    text(TOKENIZER, '"add_prefix_space": false', '"add_prefix_space": true', seen=ALL),
    key(TOKENIZER, "model.unk_token", "<s>", VOUCHED),
    key(TOKENIZER, "decoder", None),
    key(TOKENIZER, "normalizer", {"type": "Lowercase"}),
    key(TOKENIZER, "pre_tokenizer", {"type": "Whitespace"}),
    key(SETTINGS, "eos_token", "</s>"),
    key(SETTINGS, "bos_token", "<unk>"),
    key(SETTINGS, "model_max_length", 16, VOUCHED),
    key(GENERATION, "eos_token_id", 2),
    key(GENERATION, "temperature", 50.0),
    key(GENERATION, "max_new_tokens", 1),
    added(TEMPLATE, b"{{ messages[0].content }}"),
    added(TEMPLATE, b"{{ raise_exception('no') }}", "chat_template"),
    text(TEMPLATE, "<SPECIAL_11>Assistant", "<SPECIAL_11>User", seen=VOUCHED),
    text(TEMPLATE, "<SPECIAL_12>", ""),
    added("added_tokens.json", b'{"<a>": 7}', seen=VOUCHED),
    added("preprocessor_config.json", b'{"image_mean": [0, 0, 0]}', seen=VOUCHED),
    added(TOKENIZER, DEEP, "nested"),
    added(TOKENIZER, b"\x80\x04}\x94."),
    added("tokenizer.model", b"\x80\x04}\x94.", "pickle"),
    Damage("tokenizer.json is a pipe", pipe, TOKENIZER, "named pipe"),
]
for number, damage in enumerate(CHAT):
    if damage.file in (TOKENIZER, SETTINGS, TEMPLATE) and damage.key in (
        "unk_token",
        "decoder",
        "normalizer",
        "pre_tokenizer",
        "model_max_length",
    ):
        # The source and the manifest name the file; what else is wrong is what decoding shows.
        CHAT[number] = Damage(damage.name, damage.do, damage.file, "", damage.seen)
CODE = [
    added("modeling.py", b"VALUE = 1\n", seen=("source",)),
    added("helper.py", b"VALUE = 1\n", "code"),
    added("tools/run.py", b"VALUE = 1\n", "code"),
    added("pytorch_model.bin", b"x", "weights"),
    added("training_args.pt", b"PK\x03\x04", "weights"),
    added("state.pkl", pickle.dumps([1]), "weights"),
    added("params.json", b"{}", "not part"),
    added("adapter_config.json", b"{}", "not part"),
    added("additional_chat_templates/a.jinja", b"x", "not part"),
    added("LICENSE.md.bak", b"x", "not part"),
    Damage("configuration.py does more", another_code, "configuration.py", "", VOUCHED),
    text(
        "configuration.py", "class NemotronH_Nano_VL_V2_Config", "class A", "does not", ("alone",)
    ),
]
FILES = [
    added("consolidated.safetensors", SAFE, "is not named in"),
    added("model.safetensors", SAFE, "is not named in"),
    added("extra/model.safetensors", SAFE, "is not named in"),
    Damage("a pickle named .safetensors", pickled, ".safetensors", "not a safetensors file"),
    Damage("a link out of the directory", link_out, ".safetensors", "link out"),
    Damage("an index entry with ..", point_out("../fp8/"), INDEX, "../fp8/"),
    Damage("an index entry with a folder", point_out("a/"), INDEX, "weight_map"),
    Damage("an absolute index entry", point_out("/tmp/"), INDEX, "weight_map"),
    Damage("a tensor in two files", duplicate, ".safetensors", "mlp1.0.weight"),
    key(INDEX, "weight_map", {"a": 1}),
    added(INDEX, DEEP, "nested"),
    key(INDEX, "metadata", {"total_size": 7}, ("manifest",)),
    Damage("a huge header", huge_header, ".safetensors", "not a safetensors file"),
    Damage("a cut file", lambda d: truncate(first_shard(d), 0.9), ".safetensors", "truncated"),
    key("hybridquant.json", "distillation", []),
    Damage("a forged manifest", forged_manifest, "hybridquant.json", "files"),
    added("hybridquant.json", b"{", "JSON"),
]
INDEX_ONLY = FILES[11]
FILES[11] = Damage(INDEX_ONLY.name, INDEX_ONLY.do, INDEX, "SHA-256", INDEX_ONLY.seen)
SCALE = f"{IN_PROJ}.input_scale"
OTHER = LAYER.format(0, "out_proj")
VALUES = [
    tensor("an input scale x 0.001", lambda t: t[SCALE].mul_(1e-3), SCALE),
    tensor("an input scale x 1000", lambda t: t[SCALE].mul_(1e3), SCALE),
    tensor("an input scale x 1e9", lambda t: t[SCALE].mul_(1e9), SCALE, ALL),
    tensor("NaN in a scale", lambda t: t[SCALE].fill_(float("nan")), SCALE, ALL),
    tensor(
        "all input scales x 0.01",
        lambda t: [t[name].mul_(0.01) for name in t if name.endswith("input_scale")],
        SCALE,
    ),
    tensor("swapped layers", swap(LAYER.format(0, "in_proj"), LAYER.format(2, "in_proj")), IN_PROJ),
    tensor("BF16 zeros", lambda t: t["mlp1.1.weight"].zero_(), "mlp1.1.weight"),
]


def exchange_input_scales(tensors: dict) -> None:
    a = LAYER.format(1, "down_proj") + ".input_scale"
    tensors[SCALE], tensors[a] = tensors[a].clone(), tensors[SCALE].clone()


VALUES.append(tensor("exchanged input scales", exchange_input_scales, "input_scale"))


def kv_scale(factor: float) -> Callable[[dict], None]:
    def change(tensors):
        name = next(name for name in tensors if name.endswith("k_scale"))
        tensors[name].mul_(factor)

    return change


def drop_layers(directory: Path) -> None:
    edit_json(
        directory / CONFIG,
        lambda c: c["quantization_config"]["quantized_layers"].pop(IN_PROJ),
    )


MIXED = [
    tensor("a KV scale x 1e6", kv_scale(1e6), "k_scale", ALL),
    tensor("a KV scale x 1e-6", kv_scale(1e-6), "k_scale", ALL),
    tensor("a KV scale of infinity", kv_scale(float("inf")), "k_scale", ALL),
    key(CONFIG, "quantization_config.kv_cache_scheme.num_bits", 4),
    key(CONFIG, "quantization_config.kv_cache_scheme.type", "int"),
    key(CONFIG, "quantization_config.kv_cache_scheme", None),
    key(CONFIG, "quantization_config.ignore", {"a": 1}),
    key(CONFIG, "quantization_config.quantized_layers", []),
    Damage("a layer less", drop_layers, CONFIG, IN_PROJ),
]
MIXED[3] = Damage(MIXED[3].name, MIXED[3].do, CONFIG, "kv_cache_scheme")
MIXED[4] = Damage(MIXED[4].name, MIXED[4].do, CONFIG, "kv_cache_scheme")
MIXED[5] = Damage(MIXED[5].name, MIXED[5].do, ".json", "k")

WEIGHT = f"{IN_PROJ}.weight"


def nibbles(tensors: dict) -> None:
    codes = tensors[WEIGHT]
    tensors[WEIGHT] = (codes << 4) | (codes >> 4)


def rolled(tensors: dict) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].roll(1, 0)


def half_zero(tensors: dict) -> None:
    tensors[WEIGHT][: len(tensors[WEIGHT]) // 16] = 0


UNQUANTIZED = (
    "language_model.backbone.embeddings.weight",
    "language_model.backbone.norm_f.weight",
    "language_model.backbone.layers.0.mixer.A_log",
    "language_model.lm_head.weight",
)
EMBEDDINGS, NORM, A_LOG, HEAD = UNQUANTIZED


def exchanged_rows(tensors):
    rows = tensors[EMBEDDINGS]
    tensors[EMBEDDINGS] = torch.cat([rows[:100], rows[100:300].flip(0), rows[300:]])


TRAINED = [
    tensor("embeddings of zeros", lambda t: t[EMBEDDINGS].zero_(), EMBEDDINGS),
    tensor("exchanged embeddings", exchanged_rows, EMBEDDINGS),
    tensor("a doubled norm", lambda t: t[NORM].mul_(2), NORM),
    tensor("other signs of A", lambda t: t[A_LOG].neg_(), A_LOG),
    tensor("a head of NaN", lambda t: t[HEAD][0].fill_(float("nan")), HEAD),
    tensor("zeros", lambda t: t[WEIGHT].zero_(), WEIGHT),
    tensor("exchanged", swap(LAYER.format(0, "in_proj"), LAYER.format(2, "in_proj")), WEIGHT),
    tensor("swapped nibbles", nibbles, WEIGHT),
    tensor("a doubled scale", lambda t: t[f"{WEIGHT}_scale_2"].mul_(2), WEIGHT),
    tensor("rows moved on", rolled, WEIGHT),
    tensor("one row of sixteen is zero", half_zero, WEIGHT),
    tensor("signs", lambda t: t[WEIGHT].bitwise_xor_(0x88), WEIGHT),
]
FP8 = [*CONFIGS, *SECTION, *CHAT, *CODE, *FILES, *VALUES]
