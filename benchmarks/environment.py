"""Describes the machine and the libraries that a result was measured with."""

from __future__ import annotations

import torch

from checkpoint.libraries import find_mamba_kernels


def device_name(device: str) -> str:
    """Return the name of the GPU; `CPU` if `device` is not `cuda`."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return "CPU"


def mamba_kernels() -> str:
    """Return `mamba_ssm` if its kernels are used, otherwise why they are not."""
    return find_mamba_kernels() or "mamba_ssm"
