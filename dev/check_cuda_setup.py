"""Checks a release's GPU set-up on a machine that needs no GPU: installs it and imports everything.

    python3 dev/check_cuda_setup.py SCRATCH [--keep]

Into SCRATCH, which must not exist, it copies the committed tree, runs `make setup DEVICE=cuda`,
runs `pip check` in both environments, and imports there what a GPU machine will import: every
module of ours, ModelOpt, transformers' class of this model and mamba_ssm's Triton kernels in .venv;
vLLM and the plug-in in .venv-serve. It downloads about 10 GB into SCRATCH and removes it at the end
unless `--keep` is given or something failed. What pip is told by the environment (PIP_INDEX_URL,
PIP_CONFIG_FILE) holds here as well: to try what a user has who has nothing but the index, run it
with PIP_CONFIG_FILE=/dev/null and without PIP_FIND_LINKS. PYTHON names the interpreter to set up.

Exit status: 0 when everything passed, 1 when something failed, 2 when SCRATCH exists.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

# mamba_ssm is installed without its dependencies. These three serve its Mamba-3 kernels alone; the
# Triton kernels for Mamba-2 import none of them.
NOT_NEEDED_BY_MAMBA = ("apache-tvm-ffi", "quack-kernels", "tilelang")

IMPORT_OURS = """
import importlib, pathlib
root = pathlib.Path.cwd()
rooms = sorted(path.parent for path in root.glob("*/__init__.py") if path.parent.name != "tests")
count = 0
for room in rooms:
    for path in sorted(room.rglob("*.py")):
        if path.name == "__main__.py" or "released" in path.parts:
            continue
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        importlib.import_module(name)
        count += 1
import hybridquant
print(f"{count + 1} modules of ours")
"""

IMPORT_QUANTIZE = """
import modelopt.torch.quantization, modelopt.torch.export, modelopt.torch.opt
import modelopt.torch.distill
import torch
from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3
assert torch.version.cuda is not None, torch.__version__
print("torch", torch.__version__, "modelopt", modelopt.torch.__name__)
"""

# The empty module stands where the compiled extension for Mamba-1 would be: see checkpoint/.
IMPORT_MAMBA = """
import sys, types
sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
import mamba_ssm
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
print("mamba_ssm", mamba_ssm.__version__)
"""

IMPORT_SERVE = """
import torch, vllm
from vllm.model_executor.models.registry import ModelRegistry
import hybridquant_vllm, hybridquant_vllm.kernels, hybridquant_vllm.torchvision_schemas
hybridquant_vllm.register()
assert torch.version.cuda is not None, torch.__version__
assert "NemotronH_Nano_VL_V2" in ModelRegistry.get_supported_archs()
print("torch", torch.__version__, "vllm", vllm.__version__)
"""


def copy_committed_tree(folder: Path) -> None:
    """Write the tree of HEAD into `folder`: what was not committed is not released."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", "HEAD"], cwd=REPOSITORY, check=True, capture_output=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")


def run(command: list[str], folder: Path) -> bool:
    """Run a command in `folder`, its output shown, and return whether it succeeded."""
    print("$", " ".join(command)[:120].replace("\n", " "), flush=True)
    return subprocess.run(command, cwd=folder).returncode == 0


def check_dependencies(python: Path, folder: Path) -> bool:
    """Run `pip check` and return whether it finds nothing but what mamba_ssm does not need."""
    print("$", python.relative_to(folder), "-m pip check", flush=True)
    command = [str(python), "-m", "pip", "check"]
    result = subprocess.run(command, capture_output=True, text=True)
    passed = True
    for line in result.stdout.splitlines():
        # "mamba-ssm 2.3.2.post1 requires quack-kernels, which is not installed."
        words = line.replace(",", "").split()
        expected = line.startswith("mamba-ssm ") and words[3] in NOT_NEEDED_BY_MAMBA
        if expected:
            print("  expected:", line)
        elif line != "No broken requirements found.":
            print("  FAILED:", line)
            passed = False
    return passed


def check(folder: Path) -> list[str]:
    """Set up both environments in `folder` and return the names of the steps that failed."""
    quantize = folder / ".venv" / "bin" / "python"
    serve = folder / ".venv-serve" / "bin" / "python"
    python = os.environ.get("PYTHON", "python3")
    if not run(["make", "setup", "DEVICE=cuda", f"PYTHON={python}"], folder):
        return ["make setup"]
    failed = []
    for name, interpreter in (("quantize", quantize), ("serve", serve)):
        if not check_dependencies(interpreter, folder):
            failed.append(f"pip check ({name})")
    imports = {
        "import of hybridquant": (quantize, IMPORT_OURS),
        "import of ModelOpt and transformers": (quantize, IMPORT_QUANTIZE),
        "import of mamba_ssm": (quantize, IMPORT_MAMBA),
        "import of vLLM and the plug-in": (serve, IMPORT_SERVE),
    }
    for name, (interpreter, code) in imports.items():
        if not run([str(interpreter), "-c", code], folder):
            failed.append(name)
    return failed


def main() -> int:
    """Run the check and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", metavar="SCRATCH", type=Path, help="folder to make and remove")
    parser.add_argument("--keep", action="store_true", help="keep SCRATCH when all has passed")
    arguments = parser.parse_args()
    scratch = arguments.scratch.resolve()
    if scratch.exists():
        print(f"error: {scratch}: exists already (name another folder)", file=sys.stderr)
        return 2
    scratch.mkdir(parents=True)
    copy_committed_tree(scratch)
    failed = check(scratch)
    if failed:
        print(f"FAILED: {', '.join(failed)} (the folder {scratch} is kept)")
        return 1
    print("passed: set-up, pip check and imports of both environments")
    if not arguments.keep:
        shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
