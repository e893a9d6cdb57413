"""vLLM plug-in: reference kernels for FP8 and NVFP4 linear layers on CPUs, exact and slow.

vLLM calls `register` in each of its processes, in some more than once. On a GPU it does nothing.
On a CPU it adds what is missing there: vLLM has no NVFP4 kernel for any CPU, neither for W4A4 nor
for weight-only checkpoints, and its only FP8
kernels with quantized activations (W8A8) need AMX-FP8. The FP8 kernel it has for plain AMX leaves
activations in BF16 (W8A16), so accuracy measured with it would not be that of a GPU; the reference
kernel is put before it. With HYBRIDQUANT_REFERENCE_KERNELS=0 in the environment, vLLM chooses as
it would without the plug-in.
"""

import os

SWITCH = "HYBRIDQUANT_REFERENCE_KERNELS"


def register() -> None:
    """Register the reference kernels on a CPU, once per process.

    A vLLM whose kernels are organized differently gets a warning and no reference kernels: an
    exception here would stop vLLM from starting.
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

        kernels.add_missing()
    except (ImportError, AttributeError) as error:
        logger.warning(
            "hybridquant: cannot add reference kernels to this vLLM (%s): FP8 and NVFP4 may not "
            "run on this CPU.",
            error,
        )
