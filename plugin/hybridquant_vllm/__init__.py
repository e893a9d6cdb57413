"""vLLM plug-in: FP8 and NVFP4 linear layers on CPUs, computed by the book and slowly.

vLLM calls `register` in each of its processes, and more than once in some. It does nothing on a
GPU. On a CPU it adds what is missing there: vLLM has no NVFP4 kernel for any CPU, neither for W4A4
nor for weight-only checkpoints, and its only FP8
kernels with quantized activations (W8A8) need AMX-FP8. The FP8 kernel it has for plain AMX leaves
activations in BF16 (W8A16), so accuracy measured with it would not be that of the GPU; the
reference kernel goes in front of it. Set HYBRIDQUANT_REFERENCE_KERNELS=0 to have vLLM's own choice
back.
"""

import os

SWITCH = "HYBRIDQUANT_REFERENCE_KERNELS"


def register() -> None:
    """Register the reference kernels on a CPU; once a process, and never in a way that stops vLLM
    from starting.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.logger import init_logger

    # Below "vllm", so that vLLM's own log handler prints it.
    logger = init_logger("vllm.hybridquant")
    try:
        from hybridquant_vllm import kernels
    except ImportError as error:
        logger.warning(
            "hybridquant: this vLLM takes no reference kernels (%s): FP8 and NVFP4 may not run on this CPU.",
            error,
        )
        return
    kernels.add_missing()
