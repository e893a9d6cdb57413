"""What a server will run on and how, before it starts: each choice with its reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.config import CheckpointConfig
from checkpoint.faults import Fault
from serve.command import (
    CPU_SPACE,
    batched_tokens,
    build_environment,
    longest_sequence,
    media_threads,
)
from serve.decoding import RING_TOKENS
from serve.environment import ServeEnvironment
from serve.fast_video import fast_video_of
from serve.known_faults import Situation, faults_of
from serve.memory import (
    BF16,
    CPU_ALIGNMENT,
    DEFAULT_SEQUENCES,
    GB,
    GPU_ALIGNMENT,
    LARGE_GPU,
    MOST_SEQUENCES,
    Cache,
    MemoryPlan,
    cache_of,
    plan_memory,
)
from serve.precision import PRECISIONS, read_quantization
from serve.settings import ServeSettings
from serve.state_update import (
    DEFAULT_STATE,
    FOLDER_VARIABLE,
    SHIPPED,
    STATE_BYTES,
    STATE_FLAG,
    Tuned,
    find_tuned,
    state_type,
)
from serve.vllm_flags import flag_value, lets_vllm_choose_length, named_flags, switched_on

_POOL_FLAG = "--kv-cache-memory-bytes"

_OTHER_LAYOUTS = (
    "--block-size",
    "--mamba-block-size",
    "--mamba-cache-dtype",
    "--cpu-offload-gb",
    "--pipeline-parallel-size",
    "--num-gpu-blocks-override",
    "--enable-prefix-caching",
)
"""Flags with which vLLM divides its memory otherwise than is computed here."""

_KV_TYPE_FLAG = "--kv-cache-dtype"

_KV_VALUE_BYTES = {"float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of a value of the KV cache, by its type. vLLM's other types keep scales beside the values,
and are not computed."""

SEQUENCES_FLAG = "--max-num-seqs"

STEP_FLAG = "--max-num-batched-tokens"

_HOPPER = (9, 0)


@dataclass(frozen=True)
class Choice:
    """One line of the plan.

    Attributes:
        name: What was chosen.
        value: The choice.
        reason: Why.
    """

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value} ({self.reason})"


@dataclass(frozen=True)
class Room:
    """How many sequences fit.

    Attributes:
        cache: What a sequence takes.
        pool: Bytes for all sequences of one rank.
        length: Longest sequence in tokens.
        memory: How the GPU's memory is divided; None where the pool's size is given.
    """

    cache: Cache
    pool: float
    length: int
    memory: MemoryPlan | None = None

    @property
    def sequences(self) -> float:
        """Sequences of the full length that fit, as vLLM reports them."""
        return self.cache.sequences(self.pool, self.length)

    @property
    def one_block_sequences(self) -> int:
        """Sequences of at most one block of tokens that fit, each with the blocks of its state."""
        blocks = 1 + self.cache.state_blocks
        return int(self.pool // self.cache.block_bytes) // blocks


def serving_plan(
    config: CheckpointConfig,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str] = (),
) -> list[Choice]:
    """Return what a server will run on and how.

    Args:
        config: The checkpoint's.
        settings: How it is served.
        environment: Where vLLM is.
        extra: Flags of vLLM that will be added.
    """
    fast_video = fast_video_of(environment)
    choices = [_precision(config, environment, settings)]
    choices += _memory(config, settings, environment, extra)
    choices.append(_step(config, settings, extra))
    choices.append(_processes(extra))
    tuned = find_tuned(config, environment.device, extra)
    if tuned is not None:
        dtype = state_type(config, extra, settings.replayssm)
        choices.append(_state_update(tuned, dtype, settings))
    state = "on" if fast_video.is_on else "off"
    choices.append(Choice("fast video", state, fast_video.reason))
    situation = Situation(
        vllm=environment.vllm,
        device=environment.device.first(settings.tensor_parallel_size),
        ranks=settings.tensor_parallel_size,
        is_quantized=read_quantization(config) is not None,
        has_fast_video=fast_video.is_on,
        # ReplaySSM has its own kernel, which reads no file.
        is_tuned=settings.replayssm or (tuned is not None and tuned.is_there),
        flags=frozenset(switched_on(extra)),
    )
    version = environment.version
    for fault in faults_of(situation):
        choices.append(Choice(f"vLLM {version}", fault.symptom, f"{fault.remedy}; {fault.source}"))
    return choices


def room_for_sequences(
    config: CheckpointConfig,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str] = (),
) -> Room | None:
    """Return how many sequences fit; None where the memory, or how it is divided, is not known."""
    device = environment.device.first(settings.tensor_parallel_size)
    if _changed_layout(extra) is not None:
        return None
    ranks = settings.tensor_parallel_size
    on_cpu = device.kind == "cpu"
    alignment = CPU_ALIGNMENT if on_cpu else GPU_ALIGNMENT
    value_bytes = 4 if settings.dtype == "float32" else BF16
    ring = RING_TOKENS if settings.replayssm else 0
    state_bytes = STATE_BYTES.get(state_type(config, extra, settings.replayssm), 4)
    kv_bytes = _kv_value_bytes(config, extra)
    cache = cache_of(config, ranks, alignment, value_bytes, kv_bytes, ring, state_bytes)
    memory = None
    given = flag_value(extra, _POOL_FLAG)
    if given is not None:
        if not given.isdecimal():
            return None
        pool = float(given)
    elif on_cpu:
        variables = os.environ | build_environment(config, settings, device)
        pool = float(variables[CPU_SPACE]) * 2**30
    elif device.memory:
        memory = plan_memory(
            config,
            device,
            step_tokens(config, settings, extra),
            settings.video.max_frames,
            ranks,
            settings.gpu_memory_utilization,
            settings.nvfp4_as_fp8,
        )
        pool = memory.pool
    else:
        return None
    length = longest_sequence(config, settings)
    if lets_vllm_choose_length(extra):
        length = min(length, cache.longest(pool)) or length
    return Room(cache, pool, length, memory)


def sequence_limit(
    config: CheckpointConfig,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str] = (),
) -> int | None:
    """Return how many sequences a GPU may run at once where its memory holds fewer than vLLM's
    default; None where it holds more, where that is not known, or where the flag is given.

    Trap: vLLM captures decode as CUDA graphs for its default number of sequences, 256 or 1,024,
    whatever the memory holds, and ends with "max_num_seqs (1024) exceeds available Mamba cache
    blocks (248)" (vllm/config/compilation.py; seen on an H100 with 0.33).
    """
    device = environment.device.first(settings.tensor_parallel_size)
    if device.kind == "cpu" or SEQUENCES_FLAG in named_flags(extra):
        return None
    room = room_for_sequences(config, settings, environment, extra)
    if room is None:
        return None
    fitting = room.one_block_sequences
    is_large = device.memory >= LARGE_GPU
    default = MOST_SEQUENCES if is_large else DEFAULT_SEQUENCES
    return max(fitting, 1) if fitting < default else None


def memory_faults(
    config: CheckpointConfig,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str] = (),
) -> list[Fault]:
    """Return faults of a GPU that cannot hold the model or one sequence, or that others use, and of
    a cache of a given size that cannot hold one sequence.
    """
    room = room_for_sequences(config, settings, environment, extra)
    if room is None:
        return []
    if room.memory is None:
        return _pool_faults(room, extra)
    device = environment.device.first(settings.tensor_parallel_size)
    memory = room.memory
    where = f"memory of {device.name}"
    if 0 < device.free < memory.allowed:
        what = f"vLLM would take {_gb(memory.allowed)}, and {_gb(device.free)} are free"
        share = int(device.free / device.memory * 100) / 100
        return [
            Fault(where, what, f"end what else runs there, or --gpu-memory-utilization {share}")
        ]
    longest = room.cache.longest(room.pool)
    if longest == 0:
        need = memory.weights + memory.step
        what = f"weights and one step need {_gb(need)}, and vLLM may take {_gb(memory.allowed)}"
        return [Fault(where, what, "serve a quantized export, or split it over more GPUs")]
    if room.length > longest:
        what = f"one sequence of {room.length:,} tokens does not fit beside the weights"
        return [Fault(where, what, f"--max-model-len {longest}")]
    return []


def _pool_faults(room: Room, extra: Sequence[str]) -> list[Fault]:
    """Return the fault of a cache of a given size that cannot hold one sequence."""
    longest = room.cache.longest(room.pool)
    if room.length <= longest:
        return []
    where = _POOL_FLAG if _POOL_FLAG in named_flags(extra) else CPU_SPACE
    what = f"{room.pool / GB:.3g} GB hold no sequence of {room.length:,} tokens"
    remedy = f"raise it, or --max-model-len {longest}" if longest else "raise it"
    return [Fault(where, what, remedy)]


def _precision(
    config: CheckpointConfig, environment: ServeEnvironment, settings: ServeSettings
) -> Choice:
    device = environment.device.first(settings.tensor_parallel_size)
    quantization = read_quantization(config)
    if quantization is None:
        return Choice("precision", "BF16", "the checkpoint is not quantized")
    algo = quantization.algo
    if device.kind == "cpu":
        return Choice("precision", algo, "reference kernels of the plug-in: right, and slow")
    native = PRECISIONS[algo].native
    capability = ".".join(str(number) for number in device.capability)
    if device.capability >= native:
        return Choice("precision", algo, f"{device.name} has kernels for it")
    if settings.nvfp4_as_fp8:
        reason = f"{device.name} has FP8 and no FP4 arithmetic; weights change by 1/21 at most"
        return Choice("precision", f"{algo}, as FP8 from loading on", reason)
    value = f"{algo}, weights only: activations stay in BF16"
    needed = ".".join(str(number) for number in native)
    reason = f"{device.name} has capability {capability}, activations need {needed}"
    if algo != "FP8" and device.capability >= _HOPPER:
        reason += "; an FP8 export is faster there"
    return Choice("precision", value, reason)


def _memory(
    config: CheckpointConfig,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str],
) -> list[Choice]:
    changed = _changed_layout(extra)
    if changed is not None:
        return [Choice("memory", "not computed", f"{changed} divides it otherwise")]
    room = room_for_sequences(config, settings, environment, extra)
    if room is None:
        return [Choice("memory", "not computed", "the GPU's memory is not known")]
    cache = room.cache
    pool = f"{_gb(room.pool)} for sequences"
    reason = "given"
    if room.memory is not None:
        memory = room.memory
        reason = (
            f"of {_gb(memory.allowed)}, weights take {_gb(memory.weights)}, and a step, as "
            f"estimated, {_gb(memory.step)}"
        )
    elif flag_value(extra, _POOL_FLAG) is None:
        reason = CPU_SPACE
    each = (
        f"{cache.token_bytes:,} B a token of KV cache and {cache.sequence_bytes / 1e6:.1f} MB a "
        f"sequence of Mamba state, in blocks of {cache.block_tokens:,} tokens"
    )
    value = f"{room.sequences:.1f} of {room.length:,} tokens at once"
    if lets_vllm_choose_length(extra):
        value += ", the longest that fit"
    choices = [Choice("memory", pool, reason), Choice("sequences", value, each)]
    given = flag_value(extra, SEQUENCES_FLAG)
    if given is not None:
        fitting = f"given; {room.one_block_sequences:,} of up to one block fit"
        choices.append(Choice("at once", f"at most {given} sequences", fitting))
    limit = sequence_limit(config, settings, environment, extra)
    if limit is not None:
        why = "so many of up to one block fit, fewer than vLLM would prepare for"
        choices.append(Choice("at once", f"at most {limit} sequences", why))
    return choices


def _step(config: CheckpointConfig, settings: ServeSettings, extra: Sequence[str]) -> Choice:
    tokens = f"{step_tokens(config, settings, extra):,} tokens"
    if flag_value(extra, STEP_FLAG) is not None:
        return Choice("step", tokens, "given")
    longest = longest_sequence(config, settings)
    if batched_tokens(config, settings) >= longest:
        return Choice("step", tokens, f"the longest sequence has {longest:,} tokens")
    video = settings.video
    clip = f"a clip of {video.max_frames} frames at EVS rate {video.pruning_rate:g}"
    return Choice("step", tokens, f"it holds {clip}, and the question")


def step_tokens(config: CheckpointConfig, settings: ServeSettings, extra: Sequence[str]) -> int:
    """Return the tokens that one step holds, as a flag says or as is computed."""
    given = flag_value(extra, STEP_FLAG)
    if given is not None and given.isdecimal():
        return int(given)
    return batched_tokens(config, settings)


def _processes(extra: Sequence[str]) -> Choice:
    threads = media_threads()
    processes = flag_value(extra, "--api-server-count") or "1"
    value = f"{processes} process, {threads} threads for media"
    cores = len(os.sched_getaffinity(0))
    reason = f"{cores} cores; several processes would each prepare a clip that one has in its cache"
    return Choice("requests", value, reason)


def _state_update(tuned: Tuned, dtype: str, settings: ServeSettings) -> Choice:
    name = "state update"
    kept = f"states in {dtype}"
    if settings.replayssm:
        reason = f"given; each state is written every {RING_TOKENS} tokens, by vLLM's V1 runner"
        return Choice(name, f"ReplaySSM, {kept}", reason)
    if tuned.is_there:
        whose = "measured on this machine by hybridquant tune"
        if tuned.is_given:
            whose = f"given by {FOLDER_VARIABLE}"
        elif tuned.folder == SHIPPED:
            whose = "measured for this GPU, and shipped"
        return Choice(name, f"tuned, {kept}", f"{whose}{_of_half_the_size(dtype)}")
    value = f"vLLM's own choice, {kept}"
    if tuned.is_given:
        missing = f"{tuned.folder} has no {tuned.name}"
        return Choice(name, value, f"{FOLDER_VARIABLE} is given: {missing}")
    return Choice(name, value, "not tuned for this GPU: hybridquant tune")


def _of_half_the_size(dtype: str) -> str:
    """Return what tells a user how to halve the states; nothing where they are halved."""
    if dtype != DEFAULT_STATE:
        return ""
    return f"; -- {STATE_FLAG} float16 halves them: docs/serving.md"


def _changed_layout(extra: Sequence[str]) -> str | None:
    """Return a given flag with which memory is divided otherwise; None when there is none."""
    given = switched_on(extra)
    for flag in _OTHER_LAYOUTS:
        if flag in given:
            return flag
    kv_type = flag_value(extra, _KV_TYPE_FLAG)
    if kv_type is not None and kv_type != "auto" and kv_type not in _KV_VALUE_BYTES:
        return f"{_KV_TYPE_FLAG} {kv_type}"
    return None


def _kv_value_bytes(config: CheckpointConfig, extra: Sequence[str]) -> int | None:
    """Return the bytes of a value of the KV cache, by a flag or the checkpoint; None where neither
    says them: it is then of the model's own type.
    """
    given = flag_value(extra, _KV_TYPE_FLAG)
    if given in _KV_VALUE_BYTES:
        return _KV_VALUE_BYTES[given]
    section = config.raw.get("quantization_config") or {}
    return 1 if section.get("kv_cache_scheme") else None


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"
