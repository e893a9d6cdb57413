"""Settings that change how vLLM computes: ReplaySSM, and NVFP4 as FP8. What each needs.

Both are off unless they are asked for. vLLM's own sentences about them come a minute after the
start, and name neither the plug-in nor what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from checkpoint.config import CheckpointConfig
from checkpoint.faults import Fault
from hybridquant_vllm.fast_video import TESTED
from serve.environment import ServeEnvironment
from serve.fast_video import fast_video_of
from serve.precision import precision_name
from serve.settings import ServeSettings
from serve.vllm_flags import flag_value, named_flags

RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"

KERNELS_VARIABLE = "VLLM_DISABLED_KERNELS"
"""Names of kernels that vLLM does not use, with commas between them."""

FP8_CAPABILITY = (8, 9)
FP4_CAPABILITY = (10, 0)

CONVERTED = ("NVFP4", "MIXED_PRECISION")
"""`quant_algo` of checkpoints whose FP4 weights may be converted. Weight-only NVFP4 is left to
Marlin: its activations are meant to stay in BF16."""

RING_TOKENS = 16
"""Tokens that ReplaySSM keeps beside a state (vllm/config/cache.py, replayssm_buffer_len)."""


def decoding_variables(settings: ServeSettings) -> dict[str, str]:
    """Return the environment variables that the settings need; what the user has set is kept.

    Args:
        settings: How the checkpoint is served.
    """
    variables = {}
    if settings.replayssm:
        # With Triton, which is what this model's Mamba layers use, vLLM has ReplaySSM in its V1
        # model runner alone; from 0.32 on the V2 runner is the default.
        variables[RUNNER_VARIABLE] = "0"
    if settings.nvfp4_as_fp8:
        from hybridquant_vllm import DISPLACED_KERNELS

        given = os.environ.get(KERNELS_VARIABLE, "").split(",")
        names = [*filter(None, given), *DISPLACED_KERNELS]
        variables[KERNELS_VARIABLE] = ",".join(dict.fromkeys(names))
    return variables


def decoding_faults(
    config: CheckpointConfig,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str] = (),
) -> Iterator[Fault]:
    """Yield what keeps a setting that is asked for from working.

    Args:
        config: The checkpoint's.
        settings: How it is served.
        environment: Where vLLM is.
        extra: Flags of vLLM that will be added.

    Raises:
        BadInput: hf_quant_config.json cannot be read.
    """
    if settings.replayssm:
        yield from _replayssm_faults(environment)
    if settings.nvfp4_as_fp8:
        yield from _conversion_faults(config, settings, environment, extra)


def _replayssm_faults(environment: ServeEnvironment) -> Iterator[Fault]:
    where = "replayssm"
    if environment.device.kind != "cuda":
        yield Fault(where, "needs a GPU: it is a Triton kernel of vLLM", "leave it out")
    if environment.vllm[:2] not in TESTED:
        yield Fault(where, f"has not been tried with vLLM {environment.version}", _versions())
    fast_video = fast_video_of(environment)
    if not fast_video.is_on:
        what = "vLLM has it for this model through the plug-in's class, and fast video is"
        yield Fault(where, f"{what} {fast_video}", "leave it out, or turn fast video on")
    if os.environ.get(RUNNER_VARIABLE, "0").lower() in ("1", "true"):
        what = f"runs in vLLM's V1 model runner, and {RUNNER_VARIABLE} is set"
        yield Fault(where, what, f"unset {RUNNER_VARIABLE}")


def _conversion_faults(
    config: CheckpointConfig,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str],
) -> Iterator[Fault]:
    where = "nvfp4_as_fp8"
    precision = precision_name(config)
    if precision not in CONVERTED:
        yield Fault(where, f"the checkpoint is {precision}, not NVFP4", "leave it out")
    device = environment.device.first(settings.tensor_parallel_size)
    if device.kind != "cuda":
        yield Fault(where, "needs a GPU with FP8 arithmetic", "leave it out")
    elif device.capability >= FP4_CAPABILITY:
        yield Fault(where, f"{device.name} multiplies NVFP4 itself", "leave it out")
    elif device.capability < FP8_CAPABILITY:
        yield Fault(where, f"{device.name} has no FP8 arithmetic", "leave it out")
    if environment.vllm[:2] not in TESTED:
        yield Fault(where, f"has not been tried with vLLM {environment.version}", _versions())
    if "--linear-backend" in named_flags(extra):
        backend = flag_value(extra, "--linear-backend")
        what = f"--linear-backend {backend} chooses the kernel"
        yield Fault(where, what, "give one of the two")


def _versions() -> str:
    tried = " or ".join(f"{major}.{minor}" for major, minor in TESTED)
    return f"leave it out, or install vLLM {tried}"
