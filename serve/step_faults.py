"""Checks numbers of vLLM's flags against each other: its scheduler refuses them after the start.

`vllm.config.SchedulerConfig.verify_max_model_len` (0.32) is where they are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from checkpoint.config import CheckpointConfig
from checkpoint.faults import Fault
from serve.command import longest_sequence
from serve.plan import SEQUENCES_FLAG, STEP_FLAG, step_tokens
from serve.settings import ServeSettings
from serve.vllm_flags import flag_value, named_flags, switched_on

_ACTIVE_FLAG = "--max-num-active-seqs"
_LONG_FLAG = "--long-prefill-token-threshold"
_CHUNKS_FLAG = "--enable-chunked-prefill"


def step_faults(
    config: CheckpointConfig, settings: ServeSettings, extra: Sequence[str] = ()
) -> Iterator[Fault]:
    """Yield faults of sequences and lengths that do not go with a step.

    Args:
        config: The checkpoint's.
        settings: How it is served.
        extra: Flags of vLLM that will be added.
    """
    step = step_tokens(config, settings, extra)
    longest = longest_sequence(config, settings)
    sequences = _number(extra, SEQUENCES_FLAG)
    if sequences is not None and sequences > step:
        what = f"is {sequences}, and a step has {step:,} tokens, at least one for each sequence"
        yield Fault(SEQUENCES_FLAG, what, f"give {step} or less, or a higher {STEP_FLAG}")
    active = _number(extra, _ACTIVE_FLAG)
    if active is not None and sequences is not None and active > sequences:
        what = f"is {active}, and {SEQUENCES_FLAG} is {sequences}"
        yield Fault(_ACTIVE_FLAG, what, f"give {sequences} or less")
    threshold = _number(extra, _LONG_FLAG)
    if threshold is not None and threshold > longest:
        what = f"is {threshold}, and the longest sequence has {longest:,} tokens"
        yield Fault(_LONG_FLAG, what, f"give {longest} or less")
    is_whole = _CHUNKS_FLAG in named_flags(extra) and _CHUNKS_FLAG not in switched_on(extra)
    if is_whole and step < longest:
        what = f"wants a step of the longest sequence, {longest:,} tokens, and one has {step:,}"
        remedy = f"leave it out, or give {STEP_FLAG} {longest}, or --max-model-len {step}"
        yield Fault("--no-enable-chunked-prefill", what, remedy)


def _number(flags: Sequence[str], name: str) -> int | None:
    """Return a whole number that a flag gives; None where it is not given, or is written otherwise,
    as vLLM's parser alone can read it.
    """
    text = flag_value(flags, name)
    return int(text) if text is not None and text.isdecimal() else None
