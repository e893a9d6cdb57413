"""Checks what decides an answer in files that neither the source nor the manifest vouches for.

A value of config.json that fits no tensor is found by the layout. These fit, and change answers:
how pixels are scaled, which token stands for a picture, where an answer ends.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.config import CheckpointConfig, read_json
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.opened import load_tokenizer
from checkpoint.reading import read_small_file
from checkpoint.tokenizer import RELEASED

_COPY = "copy it from the source, or verify with --source"

_LIKE_RELEASED = (
    "model_type",
    "downsample_ratio",
    "image_tag_type",
    "img_context_token",
    "img_start_token",
    "img_end_token",
    "patch_size",
    "ps_version",
    "use_thumbnail",
    "template",
)
"""Keys of config.json that every model of the family shares with the release."""

_TEXT_LIKE_RELEASED = (
    "architectures",
    "model_type",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "conv_kernel",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "mamba_hidden_act",
    "mamba_proj_bias",
    "mlp_bias",
    "mlp_hidden_act",
    "residual_in_fp32",
    "sliding_window",
    "tie_word_embeddings",
    "use_bias",
    "use_conv_bias",
)
"""The same of `llm_config`."""

_NORMALIZATION = {"norm_mean": (0.1, 0.9), "norm_std": (0.1, 0.9)}
"""Least and most that pixels between 0 and 1 are normalized by. CLIP's means are 0.41 to 0.48, its
deviations 0.26 to 0.28."""

_SAMPLING = {
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "min_p": (0.0, 0.5),
    "repetition_penalty": (1.0, 1.5),
    "max_new_tokens": (16, 10_000_000),
}
"""Least and most that a release would give in generation_config.json. vLLM takes more, as
`serve.companions.SAMPLING` says, and would answer nonsense."""

_TEXT = "Which of the 3 signs, seen at 12:30, is red?"
"""What must come back from the tokenizer and be found in a rendered chat."""


def config_faults(config: CheckpointConfig) -> Iterator[Fault]:
    """Yield the keys of config.json that no model of the family has with this value."""
    where = str(config.directory / "config.json")
    released = read_json(RELEASED / "config.json")
    yield from _unlike(config.raw, released, _LIKE_RELEASED, "", where)
    text = released["llm_config"]
    yield from _unlike(config.text, text, _TEXT_LIKE_RELEASED, "llm_config.", where)
    for key, (least, most) in _NORMALIZATION.items():
        values = config.raw[key]
        if not all(least <= value <= most for value in values):
            what = f"{key} is {shortened(values, 60)}, of pixels between 0 and 1 it is"
            yield Fault(where, f"{what} {least} to {most}", _COPY)
    yield from _vision_size_faults(config, where)
    yield from auto_map_faults(config.directory / "config.json", config.raw)


def _vision_size_faults(config: CheckpointConfig, where: str) -> Iterator[Fault]:
    """Yield sizes of pictures that the vision tower cannot take."""
    tower = config.vision
    patch_size = config.raw["vision_config"].get("patch_size", tower.patch_size)
    sizes = {
        "vit_hidden_size": (config.raw["vit_hidden_size"], tower.hidden_size),
        "vision_config.patch_size": (patch_size, tower.patch_size),
    }
    for key, (found, expected) in sizes.items():
        if found != expected:
            what = f"{key} is {shortened(found, 60)}, the vision tower has {expected}"
            yield Fault(where, what, _COPY)


def _unlike(
    section: Mapping[str, Any],
    released: Mapping[str, Any],
    keys: tuple[str, ...],
    prefix: str,
    where: str,
) -> Iterator[Fault]:
    for key in keys:
        found = section.get(key)
        expected = released.get(key)
        if found != expected or isinstance(found, bool) != isinstance(expected, bool):
            found = shortened(repr(found), 60)
            what = f"{prefix}{key} is {found}, in the release it is {shortened(repr(expected), 60)}"
            yield Fault(where, what, _COPY)


def auto_map_faults(path: Path, raw: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the entries of an auto_map that lead to code elsewhere, or to a class that is not
    there.
    """
    auto_map = raw.get("auto_map", {})
    if not isinstance(auto_map, dict):
        yield Fault(str(path), "auto_map is not an object", _COPY)
        return
    for key, value in auto_map.items():
        for target in value if isinstance(value, list) else [value]:
            if target is None:
                continue
            module, _, name = str(target).rpartition(".")
            is_local = isinstance(target, str) and module.isidentifier() and name.isidentifier()
            where = f"auto_map.{shortened(key, 60)} is {shortened(repr(target), 80)}"
            if not is_local:
                yield Fault(str(path), f"{where}, not a class of a file beside it", _COPY)
                continue
            file = path.with_name(f"{module}.py")
            # Released checkpoints are copied without their model code, which vLLM does not use.
            if not file.exists() and not key.startswith("AutoModel"):
                yield Fault(str(path), f"{where}, but there is no {file.name}", _COPY)
            elif file.exists() and name not in _classes(file):
                yield Fault(str(file), f"does not define {name}, which auto_map names", _COPY)


def _classes(path: Path) -> set[str]:
    try:
        tree = ast.parse(read_small_file(path))
    except (BadInput, SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def tokenizer_faults(config: CheckpointConfig) -> Iterator[Fault]:
    """Yield what shows that tokenizer, chat template and config.json do not belong together.

    The files are sound by themselves: `checkpoint.companions.companion_faults` has seen them.
    """
    where = str(config.directory / "tokenizer.json")
    try:
        tokenizer: Any = load_tokenizer(config)
    except BadInput as bad:
        yield from bad.faults
        return
    except Exception as error:  # transformers and tokenizers raise bare exceptions
        yield Fault(where, f"cannot be loaded: {shortened(error)}", _COPY)
        return
    for token in _special_tokens(config):
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            yield Fault(where, f"has no single token {shortened(token, 60)}", _COPY)
    if len(tokenizer) > config.text["vocab_size"]:
        what = f"has {len(tokenizer)} tokens, llm_config.vocab_size is {config.text['vocab_size']}"
        yield Fault(where, what, _COPY)
    ids = tokenizer.encode(_TEXT, add_special_tokens=False)
    if tokenizer.decode(ids) != _TEXT:
        what = f"decodes {_TEXT!r} as {shortened(repr(tokenizer.decode(ids)), 80)}"
        yield Fault(where, what, _COPY)
    yield from _end_faults(config, tokenizer)
    yield from _chat_faults(config, tokenizer)


def _special_tokens(config: CheckpointConfig) -> tuple[str, ...]:
    keys = ("img_context_token", "img_start_token", "img_end_token")
    return tuple(str(config.raw[key]) for key in keys)


def _end_faults(config: CheckpointConfig, tokenizer: Any) -> Iterator[Fault]:
    """Check that all files agree on the tokens that begin and end a text."""
    path = config.directory / "tokenizer_config.json"
    for name in ("bos_token_id", "eos_token_id"):
        expected = config.text.get(name)
        found = getattr(tokenizer, name)
        if expected is not None and found != expected:
            what = f"{name.removesuffix('_id')} has id {found}, llm_config.{name} is {expected}"
            yield Fault(str(path), what, _COPY)
    path = config.directory / "generation_config.json"
    if not path.exists():
        return
    try:
        generation = read_json(path)
    except BadInput:
        return  # companion_faults reports it
    for name in ("bos_token_id", "eos_token_id"):
        found = generation.get(name, config.text.get(name))
        ids = found if isinstance(found, list) else [found]
        if config.text.get(name) not in ids:
            what = f"{name} is {shortened(found, 60)}, llm_config.{name} is {config.text.get(name)}"
            yield Fault(str(path), what, _COPY)
    # vLLM samples by this file where a request says nothing else.
    for name, (low, high) in _SAMPLING.items():
        found = generation.get(name, low)
        if found is None:
            continue
        if (
            isinstance(found, bool)
            or not isinstance(found, int | float)
            or not low <= found <= high
        ):
            what = f"{name} is {shortened(found, 60)}, expected is {low} to {high}"
            yield Fault(str(path), what, _COPY)


def _chat_faults(config: CheckpointConfig, tokenizer: Any) -> Iterator[Fault]:
    """Render a conversation with a picture and a clip; what is said must be in it."""
    path = config.directory / "chat_template.jinja"
    if not path.exists():
        path = config.directory / "tokenizer_config.json"
    parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": _TEXT}]
    messages = [
        {"role": "system", "content": "/no_think"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "The second."},
        {"role": "user", "content": "Why?"},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ended = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # jinja2 and the template itself raise whatever they like
        yield Fault(str(path), f"chat_template fails: {shortened(error)}", _COPY)
        return
    wanted = [config.raw["img_context_token"], _TEXT, "The second.", "Why?"]
    end = tokenizer.eos_token
    if end:
        wanted.append(end)
    positions = [text.find(part) for part in wanted[:4]]
    missing = [part for part in wanted if part not in text]
    if missing:
        what = f"chat_template leaves out {shortened(repr(missing[0]), 80)}"
        yield Fault(str(path), what, _COPY)
    elif positions != sorted(positions):
        yield Fault(str(path), "chat_template changes the order of a conversation", _COPY)
    elif not text.startswith(ended) or len(text) == len(ended):
        yield Fault(str(path), "chat_template does not begin the assistant's turn", _COPY)
