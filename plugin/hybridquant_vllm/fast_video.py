"""Decides whether vLLM's way of preparing clips is replaced, and registers the replacement.

What is replaced: the video loader (`loader`), the processor of clips and pictures (`processor`)
and what the model does with their pixels (`model`). Nothing here imports a model.
"""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

from hybridquant_vllm.switches import is_on

SWITCH = "HYBRIDQUANT_FAST_VIDEO"

ARCHITECTURE = "NemotronH_Nano_VL_V2"

TESTED = ((0, 32), (0, 33))
"""vLLM releases whose classes the plug-in is tested with."""

_MODEL_SOURCE = Path("model_executor", "models", "nano_nemotron_vl.py")


def reason_to_step_aside(version: str, vllm_folder: Path) -> str | None:
    """Return why this vLLM keeps its own way, or None.

    Args:
        version: vLLM's version, as `0.33.0` or `0.32.0+cpu`.
        vllm_folder: The folder of the package `vllm`.
    """
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    if tuple(numbers) not in TESTED:
        tested = " and ".join(f"{major}.{minor}" for major, minor in TESTED)
        return f"it is tested with vLLM {tested}, not with {version}"
    source = vllm_folder / _MODEL_SOURCE
    if not source.exists():
        return f"vLLM {version} has no {_MODEL_SOURCE}"
    # vLLM's pull request 57924 sends uint8 frames and normalizes them on the device itself. Read
    # as text: importing the module would import the model.
    if "supports_mm_device_do_normalize" in source.read_text(encoding="utf-8"):
        return f"vLLM {version} normalizes this model's frames on the device itself"
    return None


def register() -> None:
    """Register the loader and the model, or say why not; a second call changes nothing."""
    if not is_on(SWITCH, default=True):
        return
    import vllm
    from vllm.logger import init_logger

    logger = init_logger("vllm.hybridquant")
    folder = Path(vllm.__file__).parent
    reason = reason_to_step_aside(vllm.__version__, folder)
    if reason is not None:
        # vLLM calls plug-ins in each of its processes; one line is enough.
        if multiprocessing.parent_process() is None:
            logger.warning("hybridquant: fast video steps aside: %s.", reason)
        return
    from vllm.model_executor.models import ModelRegistry

    # Without PyAV this raises now, not at the first request.
    import hybridquant_vllm.loader  # noqa: F401

    # A string: importing the class here would initialize CUDA in a process that forks later.
    ModelRegistry.register_model(ARCHITECTURE, f"hybridquant_vllm.model:{ARCHITECTURE}")


def announce() -> None:
    """Log what is replaced, in the process that prepares requests.

    Trap: vLLM loads plug-ins before it has set up its log, so that a line of `register` is lost.
    """
    if multiprocessing.parent_process() is not None:
        return
    import vllm
    from vllm.logger import init_logger

    from hybridquant_vllm import __version__

    init_logger("vllm.hybridquant").info_once(
        f"hybridquant {__version__}: fast video replaces the loader, the processor and the pixel "
        f"input of {ARCHITECTURE} in vLLM {vllm.__version__} (off by {SWITCH}=0)."
    )
