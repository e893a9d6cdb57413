"""vLLM plug-in: fast video everywhere, and reference FP8 and NVFP4 kernels on CPUs.

vLLM calls `register` in each of its processes, in some more than once.

- `configuration` gives transformers the model's configuration, so that vLLM runs no Python of a
  checkpoint and needs no `--trust-remote-code`.
- `fast_video` replaces how vLLM prepares clips and pictures for Nemotron Nano VL. Off by
  HYBRIDQUANT_FAST_VIDEO=0.
- `media_options` checks and bounds what a request says about how its clips are sampled.
- `connector` answers requests whose media cannot be had with 400 and the reason.
- `odd_requests` does so for requests whose numbers or texts cannot be sent to the engine, and
  `unread_requests` for those that vLLM cannot read.
- `sent_media` keeps a request that was refused from spoiling the next with the same picture.
- `key_guard` asks for the server's key at all addresses, where vLLM is given it by --middleware.
- `kernels` adds what is missing on a CPU: vLLM has no NVFP4 kernel for any CPU, neither for W4A4
  nor for weight-only checkpoints, and its only FP8 kernels with quantized activations (W8A8) need
  AMX-FP8. The FP8 kernel it has for plain AMX leaves activations in BF16 (W8A16), so accuracy
  measured with it would not be that of a GPU; the reference kernel is put before it. With
  HYBRIDQUANT_REFERENCE_KERNELS=0 in the environment, vLLM chooses as it would without the plug-in.
- `nvfp4_as_fp8` adds a kernel that converts NVFP4 weights to FP8 while loading, for GPUs with FP8
  and without FP4 arithmetic, where VLLM_DISABLED_KERNELS turns vLLM's own off.
- `layer_report` writes down which layers are quantized, and by which kernel, where
  HYBRIDQUANT_LAYER_REPORT names a file.
- `frames` and `pixels` import no vLLM: hybridquant calibrates with them.
"""

import importlib
import os

__version__ = "0.2.1"

SWITCH = "HYBRIDQUANT_REFERENCE_KERNELS"

DISABLED_KERNELS = "VLLM_DISABLED_KERNELS"
"""vLLM's own variable: names of kernels, with commas between them, that it does not use."""

DISPLACED_KERNELS = (
    "MarlinNvFp4LinearKernel",
    "FlashInferTrtllmNvFp4LinearKernel",
    "FlashInferCudnnNvFp4LinearKernel",
    "FbgemmNvFp4LinearKernel",
    "EmulationNvFp4LinearKernel",
    "HummingNvFp4LinearKernel",
)
"""vLLM's NVFP4 kernels that say they run on Hopper or Ada and come before a registered one. Where
DISABLED_KERNELS names all of them, `nvfp4_as_fp8` is chosen (vLLM 0.32 and 0.33)."""


_WITHOUT = {
    "configuration": "--trust-remote-code is needed",
    "fast_video": "fast video is off, vLLM prepares clips itself",
    "connector": "bad media may be answered with 500",
    "odd_requests": "odd requests may be answered with 500",
    "sent_media": "a picture of a refused request may be answered with 500",
    "layer_report": "cannot report on layers",
}
"""Modules with a function `register`, and what is missing where it fails."""


def register() -> None:
    """Register what the plug-in replaces; an exception here would stop vLLM from starting."""
    from vllm.logger import init_logger

    # Below "vllm", so that vLLM's own log handler prints it.
    logger = init_logger("vllm.hybridquant")
    for name, missing in _WITHOUT.items():
        try:
            importlib.import_module(f"hybridquant_vllm.{name}").register()
        except Exception as error:
            logger.warning("hybridquant: %s (%r).", missing, error)
    try:
        _register_kernels()
    except (ImportError, AttributeError) as error:
        logger.warning(
            "hybridquant: cannot add kernels to this vLLM (%s): FP8 and NVFP4 may not run here.",
            error,
        )


def _register_kernels() -> None:
    """Register the reference kernels on a CPU, and NVFP4 as FP8 on a GPU where it is asked for;
    once per process.

    Raises:
        ImportError: This vLLM organizes its kernels differently.
        AttributeError: The same.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from hybridquant_vllm.switches import is_on

        if not is_on(SWITCH, default=True):
            return
        from hybridquant_vllm import kernels

        kernels.add_missing()
    elif DISPLACED_KERNELS[0] in os.environ.get(DISABLED_KERNELS, "").split(","):
        from hybridquant_vllm import nvfp4_as_fp8

        nvfp4_as_fp8.register()
