"""How to serve an export, as report and card say it: commands, and what each GPU computes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from export.publish.facts import BF16, Facts
from serve.command import build_command
from serve.environment import Device
from serve.precision import BF16_CAPABILITY, PRECISIONS, Version
from serve.settings import override, settings_for

VLLM: Version = (0, 33, 0)
"""The version that the commands are for, and that requirements-serve-cuda.txt pins."""

_GPUS = (
    ("Blackwell, capability 10.0 and newer", (10, 0)),
    ("Hopper, 9.0", (9, 0)),
    ("Ada, 8.9", (8, 9)),
    ("Ampere, 8.0", (8, 0)),
)
_MACHINES_OWN = ("--host", "--port", "--served-model-name", "--allowed-media-domains")
"""Flags of `build_command` that say where a server listens and what it may fetch, not how this
checkpoint is served."""


@dataclass(frozen=True)
class Commands:
    """Shell commands that serve an export, each with EVS at the manifest's rate and without.

    Attributes:
        ours: `hybridquant serve …`, which takes a directory.
        ours_without_evs: The same with EVS off.
        vllm: `vllm serve …` with all its flags, a line each.
        vllm_without_evs: The same with EVS off.
    """

    ours: str
    ours_without_evs: str
    vllm: str
    vllm_without_evs: str


def serve_commands(facts: Facts, name: str) -> Commands:
    """Return how to serve an export.

    Args:
        facts: The export's.
        name: What the commands call it: a directory, or `ORG/NAME` on the Hub.

    Raises:
        BadInput: The manifest's settings are out of range.
    """
    settings = settings_for(facts.directory)
    off = override(settings, {"video.pruning_rate": 0.0})
    device = Device("cuda", "GPU", BF16_CAPABILITY, 1)
    lines = []
    for chosen in (settings, off):
        command = build_command(facts.directory, chosen, VLLM, device)
        lines.append(_one_flag_a_line(["vllm", "serve", name, *command[3:]]))
    ours = shlex.join(["hybridquant", "serve", name.rpartition("/")[2]])
    return Commands(ours, f"{ours} --video-pruning-rate 0", *lines)


def kernels(facts: Facts) -> list[tuple[str, str]]:
    """Return for each generation of GPUs what it computes with this export, for a table.

    The capabilities are those that `hybridquant serve` checks before it starts vLLM.
    """
    algos = [algo for algo in facts.formats if algo != BF16]
    rows = []
    for gpu, capability in _GPUS:
        sentences = [_arithmetic(algo, capability) for algo in algos]
        if len(algos) > 1:
            named = zip(algos, sentences, strict=True)
            sentences = [f"{algo}: {sentence}" for algo, sentence in named]
        rows.append((gpu, "; ".join(sentences)))
    return rows


def _arithmetic(algo: str, capability: tuple[int, int]) -> str:
    if algo not in PRECISIONS:
        return "not known to hybridquant serve"
    precision = PRECISIONS[algo]
    if precision.native == BF16_CAPABILITY:
        return "quantized weights, BF16 arithmetic"
    if capability >= precision.native:
        return f"{algo} arithmetic, weights and activations"
    if capability < precision.least_capability(VLLM):
        return "does not run"
    sentence = "quantized weights, BF16 arithmetic"
    if precision.weight_only_since > precision.loaded_since:
        major, minor, _ = precision.weight_only_since
        sentence = f"{sentence} (vLLM {major}.{minor} and newer)"
    return sentence


def _one_flag_a_line(command: list[str]) -> str:
    lines = []
    words: list[str] = []
    skips_value = False
    for word in command:
        if word.startswith("--"):
            skips_value = word in _MACHINES_OWN
            if words:
                lines.append(shlex.join(words))
            words = []
        if not skips_value:
            words.append(word)
    lines.append(shlex.join(words))
    return " \\\n    ".join(line for line in lines if line)
