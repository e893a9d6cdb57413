"""transformers' classes for this model, imported once mamba_ssm's kernels can be found: every room
takes them here.

transformers binds the Mamba-2 scan at the import of its module: mamba_ssm's kernels if `import
mamba_ssm` works, else plain PyTorch, which takes twice as long on a GPU, with a warning that
`checkpoint.native` silences with others.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch


def find_kernels() -> str | None:
    """Prepare the import of mamba_ssm; None when its kernels will be used, else why they will not.

    Upstream traps of mamba_ssm 2.3.2: its import asks for a compiled extension that only Mamba-1
    calls, and that an installation without a CUDA compiler lacks; an empty module in its place is
    enough for Mamba-2. And on a machine without CUDA it may import, and then refuses every tensor.
    """
    if not torch.cuda.is_available():
        sys.modules["mamba_ssm"] = None  # type: ignore[assignment]
        return "there is no CUDA device"
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba_ssm is not installed"
    if (
        "selective_scan_cuda" not in sys.modules
        and importlib.util.find_spec("selective_scan_cuda") is None
    ):
        sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    try:
        importlib.import_module("mamba_ssm")
    except Exception as error:  # whatever a missing or unfit dependency of its raises
        return f"mamba_ssm does not import: {type(error).__name__}: {error}"
    return None


KERNELS_MISSING = find_kernels()
"""Why mamba_ssm's kernels are not used; None where they are."""

from transformers.models.nemotron_h import modeling_nemotron_h as modeling  # noqa: E402
from transformers.models.nemotron_h.modeling_nemotron_h import (  # noqa: E402
    NemotronHBlock,
    NemotronHForCausalLM,
    NemotronHMamba2Mixer,
    NemotronHRMSNorm,
)
from transformers.models.nemotron_h_omni import (  # noqa: E402
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
)
from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask  # noqa: E402

__all__ = [
    "KERNELS_MISSING",
    "NemotronHBlock",
    "NemotronHForCausalLM",
    "NemotronHMamba2Mixer",
    "NemotronHRMSNorm",
    "NemotronH_Omni_Reasoning_V3",
    "NemotronH_Omni_Reasoning_V3_Config",
    "compute_retention_mask",
    "find_kernels",
    "modeling",
]
