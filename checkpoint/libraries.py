"""Prepares the libraries that a command uses; nothing of it happens at import.

transformers binds the Mamba-2 scan when its module is imported: mamba_ssm's kernels if `mamba_ssm`
imports then, otherwise plain PyTorch, which takes twice as long on a GPU. So every room takes
transformers' model classes from `language_model_classes` and `model_classes`, which first make sure
that the kernels can be found.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from types import ModuleType
from typing import Any

from checkpoint.faults import is_first_process, shortened
from checkpoint.log import get_logger

logger = get_logger(__name__)

_LANGUAGE_MODEL = "transformers.models.nemotron_h.modeling_nemotron_h"
_MODEL = "transformers.models.nemotron_h_omni.modeling_nemotron_h_omni"

_IGNORED_WARNINGS = (
    "transformers .* is not tested with current version of modelopt",
    "Distributed training is initialized but no parallel_state is set for",
)
"""Beginnings of warnings of ModelOpt 0.47 that say nothing to a user, as patterns."""


def prepare_libraries() -> None:
    """Make mamba_ssm's kernels importable and silence what says nothing to a user.

    - transformers logs missing tensors that this model never uses; what is really missing is
      raised by `checkpoint.native`.
    - ModelOpt 0.47 warns at import that it is not tested with transformers 5.15 and newer. Older
      ones cannot run this architecture with a cache, and our tests run the pinned pair.
    - Under a launcher ModelOpt warns of each kind of layer that it takes all processes for data
      parallel, which they are.
    - What libraries warn of, every process of a launcher would print: the first one's is enough.
    """
    if not is_first_process():
        warnings.simplefilter("ignore")
        # torch reads it when it is imported: DDP warns from C++.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if _LANGUAGE_MODEL in sys.modules and "mamba_ssm" not in sys.modules:
        logger.warning("transformers' Mamba-2 was imported before its kernels were prepared")
    find_mamba_kernels()
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    from transformers import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def find_mamba_kernels() -> str | None:
    """Prepare the import of mamba_ssm.

    Upstream traps of mamba_ssm 2.3.2: its import needs a compiled extension that only Mamba-1
    calls and that an installation without a CUDA compiler lacks; an empty module in its place is
    enough for Mamba-2. And on a machine without CUDA it may import, and then fails on every tensor.

    Returns:
        None if its kernels will be used, otherwise why they will not be.
    """
    import torch

    if not torch.cuda.is_available():
        if "mamba_ssm" not in sys.modules:
            sys.modules["mamba_ssm"] = None  # type: ignore[assignment]
        return "there is no CUDA device"
    if "mamba_ssm" not in sys.modules and importlib.util.find_spec("mamba_ssm") is None:
        return "mamba_ssm is not installed"
    extension = "selective_scan_cuda"
    if extension not in sys.modules and importlib.util.find_spec(extension) is None:
        sys.modules[extension] = ModuleType(extension)
    try:
        importlib.import_module("mamba_ssm")
    except Exception as error:  # whatever a missing or unsuitable dependency raises
        return f"mamba_ssm does not import: {type(error).__name__}: {shortened(error)}"
    return None


def language_model_classes() -> Any:
    """transformers' module of the language model: `NemotronHForCausalLM` and its parts."""
    find_mamba_kernels()
    return importlib.import_module(_LANGUAGE_MODEL)


def model_classes() -> Any:
    """transformers' module of the vision-language model: `NemotronH_Omni_Reasoning_V3`."""
    find_mamba_kernels()
    return importlib.import_module(_MODEL)


_PACKAGES = (
    "nvidia-modelopt",
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "hybridquant",
)
"""Packages whose version may change the result."""


def installed_versions() -> dict[str, str]:
    """Versions of the packages that may change the result."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
