"""Checks the files beside the weights: tokenizer, configuration, chat template, and what is sampled
with where a request does not say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.config import read_json
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.reading import (
    TOKENIZER_FILES,
    checkpoint_file_fault,
    read_small_file,
    tokenizer_faults,
)

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")

GENERATION = "generation_config.json"

READ_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Of files that vLLM and transformers read by themselves, beside weights."""

SAMPLING = {
    "temperature": (0, 1e6),
    "top_k": (-1, 2**31 - 1),
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-9, 1e6),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "max_new_tokens": (1, 2**31 - 1),
}
"""Ranges of what vLLM takes from generation_config.json where a request gives nothing
(`ModelConfig.get_diff_sampling_param` and `SamplingParams`, 0.32). With another value, every such
request is refused."""

_WHOLE = ("top_k", "max_new_tokens")

_COPY = "copy it from the BF16 checkpoint"


def companion_faults(directory: Path) -> list[Fault]:
    """Return faults of the files beside the weights: tokenizer, configuration module, template."""
    faults = [*_foreign_file_faults(directory)]
    if faults:  # what they contain is not read
        return faults
    for name in TOKENIZER_FILES:
        if not (directory / name).exists():
            faults.append(Fault(str(directory / name), "no such file", _COPY))
    faults += tokenizer_faults(directory)
    faults += auto_map_faults(directory)
    if not has_chat_template(directory):
        template = str(directory / TEMPLATE_FILES[0])
        faults.append(Fault(template, "no such file, so no chat is possible", _COPY))
    faults += _template_faults(directory)
    faults += generation_faults(directory)
    return faults


def auto_map_faults(directory: Path) -> Iterator[Fault]:
    """Yield faults of the configuration class that vLLM loads from the directory."""
    try:
        auto_map = read_json(directory / "config.json").get("auto_map")
    except BadInput:
        return  # read_config reports it
    target = auto_map.get("AutoConfig") if isinstance(auto_map, dict) else None
    if not target:
        yield Fault(str(directory / "config.json"), "auto_map names no AutoConfig", _COPY)
        return
    # "configuration.Name", with "organization/repository--" before it when it is on the Hub.
    local = str(target).rpartition("--")[2]
    module = directory / (local.rpartition(".")[0] + ".py")
    if not module.exists():
        what = "no such file, though config.json's auto_map names it"
        yield Fault(str(module), what, _COPY)


def has_chat_template(directory: Path) -> bool:
    """Return whether there is a chat template in one of the places where transformers looks."""
    if any((directory / name).exists() for name in TEMPLATE_FILES):
        return True
    try:
        return bool(read_json(directory / "tokenizer_config.json").get("chat_template"))
    except BadInput:
        return False


def _foreign_file_faults(directory: Path) -> Iterator[Fault]:
    """Yield faults of files that must not be read: a pipe would block vLLM for ever, and a link out
    of the directory gives it, and with the chat template its users, what belongs to somebody else.
    """
    for path in sorted(directory.iterdir()):
        is_wanted = path.name in (*TOKENIZER_FILES, "config.json")  # whose faults say more
        if path.suffix not in READ_SUFFIXES or is_wanted:
            continue
        fault = checkpoint_file_fault(path, directory)
        if fault is not None:
            yield fault


def _template_faults(directory: Path) -> Iterator[Fault]:
    """Yield faults of a chat template that cannot be read."""
    for name in TEMPLATE_FILES:
        path = directory / name
        if not path.exists():
            continue
        try:
            read_small_file(path, directory).decode("utf-8")
        except BadInput as bad:
            yield from bad.faults
        except UnicodeDecodeError:
            yield Fault(str(path), "is not UTF-8", _COPY)


def generation_faults(directory: Path) -> Iterator[Fault]:
    """Yield faults of generation_config.json, which vLLM reads when there is one."""
    path = directory / GENERATION
    if not path.exists():
        return
    try:
        raw = read_json(path)
    except BadInput as bad:
        yield from bad.faults
        return
    yield from sampling_faults(str(path), raw)
    ends = raw.get("eos_token_id")
    if ends is None:
        return
    for end in ends if isinstance(ends, list) else [ends]:
        if not _is_number(end, 0, 2**31 - 1, True):
            what = f"eos_token_id is {shortened(repr(end), 60)}"
            yield Fault(str(path), what, "give token ids, or leave it out")


def sampling_faults(where: str, defaults: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield faults of what vLLM takes where a request gives nothing.

    Args:
        where: Where it stands.
        defaults: Values by name; other names are left alone.
    """
    for name, (least, most) in SAMPLING.items():
        value = defaults.get(name)
        if value is not None and not _is_number(value, least, most, name in _WHOLE):
            kind = "a whole number" if name in _WHOLE else "a number"
            what = f"{name} is {shortened(repr(value), 60)}"
            yield Fault(where, what, f"{kind} from {least:g} to {most:g}, or leave it out")


def _is_number(value: Any, least: float, most: float, is_whole: bool) -> bool:
    kinds = (int,) if is_whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
